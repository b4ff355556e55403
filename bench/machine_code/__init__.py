"""Reading the kernels' machine code without a GPU: record the launches of public calls, compile them, count."""
