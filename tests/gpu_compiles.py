"""Run by `test_gpu.py` in a process of its own: the kernels compiled for an H100, which need not be there.

Prints a line of JSON: kernel -> size of its machine code in bytes.
"""

import json
import sys

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime import JITFunction

from ssl_pretrain.views import kernels

F, L, B, N = "*fp32", "*i64", "*u8", "i32"
SIGNATURES: list[tuple[JITFunction, list[str], dict[str, object]]] = [
    (kernels.resample, [B, L, L, F, N, N], {"mirrored": False, "scatter": True}),
    (kernels.resample, [B, L, L, F, N, N], {"mirrored": True, "scatter": False}),
    (kernels.blur, [F, F, L, F, N, N], {"along_x": True}),
    (kernels.blur, [F, F, L, F, N, N], {"along_x": False}),
    (kernels.hue, [F, F, F, N, N, N], {"yiq": False}),
    (kernels.hue, [F, F, F, N, N, N], {"yiq": True}),
    (kernels.mix, [F, F, F, N, N, N, N], {"TILES": 128}),
]


def main() -> None:
    found = {}
    for kernel, kinds, fixed in SIGNATURES:
        constants = {**fixed, "BLOCK": kernels.BLOCK}
        free = [name for name in kernel.arg_names if name not in constants]
        signature = dict(zip(free, kinds, strict=True)) | dict.fromkeys(constants, "constexpr")
        made = compile(ASTSource(kernel, signature, constexprs=constants), target=GPUTarget("cuda", 90, 32))
        name = kernel.fn.__name__ + "".join(f" {k}={v}" for k, v in fixed.items())
        found[name] = len(made.asm["cubin"])
        if "-v" in sys.argv:
            ptx = made.asm["ptx"]
            print(name, "f64 ops", ptx.count(".f64"), "lines", ptx.count("\n"), file=sys.stderr)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
