"""The Triton kernels compile to machine code for a real device, even where there is none to run them on."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from e2e_sae_nb import triton_kernels as k

def compiled(function, types, **constants):
    signature = types | {name: "constexpr" for name in constants}
    return len(triton.compile(ASTSource(function, signature, constants), target=GPUTarget("cuda", 90, 32)).asm["cubin"])

for dtype in ("fp32", "bf16", "fp16"):
    rows = {"z_ptr": "*" + dtype, "d_ptr": "*" + dtype, "kl_ptr": "*fp32", "width": "i32", "padded": "i32", "z_stride": "i32", "d_stride": "i32",
            "scale": "fp32", "cap": "fp32", "factor": "fp32"}
    for cap, grad in ((False, True), (True, True), (True, False)):
        assert compiled(k._kl_rows, rows, CAP=cap, GRAD=grad, BLOCK=4096) > 1000
    pairs = {"row_ptr": "*i64", "token_ptr": "*i64", "rows_ptr": "*" + dtype, "x_ptr": "*" + dtype, "out_ptr": "*fp32", "width": "i32"}
    assert compiled(k._pair_products, pairs, BLOCK=1024) > 1000
    bags = {"index_ptr": "*i64", "rows_ptr": "*" + dtype, "offset_ptr": "*i64", "weight_ptr": "*" + dtype, "part_ptr": "*fp32"}
    sizes = {"bags": "i32", "pairs": "i32", "width": "i32"}
    assert compiled(k._window_sums, bags | sizes, BLOCK=512, TURN=8, CUT=256) > 1000
    assert compiled(k._bag_sums, bags | {"out_ptr": "*" + dtype} | sizes, BLOCK=512, TURN=8, CUT=256) > 1000
    assert compiled(k._segment_sums, {"value_ptr": "*" + dtype, "start_ptr": "*i64", "out_ptr": "*" + dtype}, BLOCK=256) > 1000
print("compiled")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="triton's compiler is for Linux")
def test_kernels_compile_for_a_device():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}  # a notebook may have set it in this process
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, timeout=300)
    assert done.stdout.strip() == "compiled", done.stderr[-2000:]
