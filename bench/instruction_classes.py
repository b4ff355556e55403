"""Which unit of a processor an instruction keeps busy, by its mnemonic, for NVIDIA's and AMD's machine code.

Classes of NVIDIA's code (SASS; names as in the CUDA Binary Utilities' instruction set reference):

* ``mufu``: the special-function unit (MUFU.EX2, .RSQ, ...), a quarter or an eighth of the rate of an addition;
* ``fp``: 32-bit and packed 16-bit floating point, their comparisons, selections and conversions;
* ``integer``: integer, logic, moves and predicates, the uniform datapath's included;
* ``memory``: loads and stores of any space, constants too;
* ``control``: the rest (branches, barriers, shuffles, special registers).

Classes of AMD's (names as in the CDNA ISA guides; each has an issue port of its own):

* ``mufu``: transcendental instructions of the vector unit (v_exp_f32, v_log_f32, v_rcp_f32, ...), quarter rate;
* ``vector``: all others of the vector unit (VALU), integer and floating point alike;
* ``scalar``: the scalar unit (SALU);
* ``memory``: global, buffer, flat, scratch, LDS, and scalar loads;
* ``control``: branches, waits, barriers, s_nop.
"""

from __future__ import annotations

import re

NVIDIA_CLASSES = ("mufu", "fp", "integer", "memory", "control")
AMD_CLASSES = ("mufu", "vector", "scalar", "memory", "control")

_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
# F...: FFMA, FADD, FMUL, FMNMX, FSEL, FSETP, Blackwell's packed FFMA2; H...: HFMA2, HADD2; D...: double precision.
_FP = re.compile(r"U?F(?:FMA|ADD|MUL|MNMX|SEL|SET|CHK|SWZ|RND|2FP|2F)|U?(?:I2F|F2I)|[HD](?:FMA|ADD|MUL|SET|MNMX)")
_INTEGER = re.compile(
    r"U?(?:IADD|IMAD|IMUL|ISETP|ISET|IMNMX|IABS|ISCADD|IDP|LOP|SHF(?!L)|SHL|SHR|LEA|SEL|PRMT|MOV|SGXT|POPC|FLO|BREV|BMSK"
    r"|PLOP|PSETP|VIADD|VIMNMX|VIADDMNMX|VABSDIFF)|P2R|R2P|P2UR|R2UR|UP2UR|CS2R"
)
_MEMORY = re.compile(r"LD(?:G|S|L|C|SM|GSTS)|ULDC|LDCU|ST(?:G|S|L)|LD$|ST$|ATOM|RED(?:G)?$|U?BLKCP|UTMA")
_TRANSCENDENTAL = re.compile(r"v_(?:exp|log|rcp|rcp_iflag|rsq|sqrt|sin|cos)(?:_legacy)?_(?:f16|f32|f64|bf16)")
_AMD_MEMORY = re.compile(r"(?:global|buffer|flat|scratch|ds)_|s_(?:buffer_)?(?:load|store)|s_dcache")
_AMD_CONTROL = re.compile(
    r"s_(?:c?branch|waitcnt|wait_|barrier|nop|endpgm|sleep|set(?:prio|reg|pc|halt)|getreg|sendmsg|swappc|call|trap)"
)


def nvidia_class(text: str) -> str:
    """The class of a line of SASS."""
    mnemonic = _PREDICATE.sub("", text).split(maxsplit=1)[0].split(".")[0]
    if mnemonic == "MUFU":
        return "mufu"
    for name, pattern in (("fp", _FP), ("memory", _MEMORY), ("integer", _INTEGER)):
        if pattern.match(mnemonic):
            return name
    return "control"


def amd_class(text: str) -> str:
    """The class of a line of AMD's assembly."""
    mnemonic = text.split(maxsplit=1)[0]
    if _TRANSCENDENTAL.match(mnemonic):
        return "mufu"
    if mnemonic.startswith("v_"):
        return "vector"
    if _AMD_MEMORY.match(mnemonic):
        return "memory"
    return "control" if _AMD_CONTROL.match(mnemonic) else "scalar"


def is_amd(text: str) -> bool:
    """Whose line it is: AMD's mnemonics are in lower case, with underscores."""
    return bool(re.match(r"[a-z]+_", text))


def instruction_class(text: str) -> str:
    """The class of a line of either."""
    return amd_class(text) if is_amd(text) else nvidia_class(text)
