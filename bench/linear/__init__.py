"""The benchmark of the linear path: from hidden states and LM head to loss and gradients."""
