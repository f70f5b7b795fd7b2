"""The interpreter of tests/ptx follows the PTX ISA, reports what would fail on a GPU, and runs the output of Triton."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import ptx

ROOT = Path(__file__).parents[1]
HEAD = """
.visible .entry small(
  .param .u64 small_param_0,
  .param .u64 small_param_1
)
{
  .reg .pred %p<9>;
  .reg .b16 %rs<9>;
  .reg .b32 %r<40>;
  .reg .b64 %rd<9>;
  ld.param.b64 %rd0, [small_param_0];
  ld.param.b64 %rd1, [small_param_1];
  mov.u32 %r0, %tid.x;
  mad.wide.u32 %rd2, %r0, 4, %rd0;
  mad.wide.u32 %rd3, %r0, 4, %rd1;
  shl.b32 %r1, %r0, 2;
  mov.b32 %r2, memory;
  add.s32 %r3, %r2, %r1;
"""


def run(body: str, given: torch.Tensor, threads: int = 64, shared: int = 8192, seed: int = 0) -> torch.Tensor:
    """Run PTX code; return what it stores at %rd3. %rd2 points to the thread's element of `given`, %r3 to its 4 shared bytes."""
    program = ptx.Program(f"{HEAD}{body}\n  ret;\n}}")
    out = torch.zeros(threads, dtype=torch.int32)
    ranges = [(x.data_ptr(), x.data_ptr() + 4 * x.numel()) for x in (given, out)]
    parameters = b"".join(x.data_ptr().to_bytes(8, "little") for x in (given, out))
    program.run((1, 1, 1), threads, shared, parameters, ranges, seed)
    return out


def unary(instruction: str, given: torch.Tensor) -> torch.Tensor:
    body = f"ld.global.b32 %r4, [%rd2]; {instruction} st.global.b32 [%rd3], %r5;"
    return run(body, given.view(torch.int32), threads=len(given)).view(given.dtype)


def test_numbers():
    """Compare each instruction with torch or plain arithmetic, for both signs, halfway cases of rounding, NaN and inf."""
    whole = torch.arange(-32, 32, dtype=torch.int32) * 123_457_891
    assert torch.equal(unary("mul.hi.s32 %r5, %r4, 7;", whole), (whole.long() * 7 >> 32).int())
    unsigned = whole.long() & 0xFFFFFFFF
    assert torch.equal(unary("mul.hi.u32 %r5, %r4, 1000003;", whole).long() & 0xFFFFFFFF, unsigned * 1_000_003 >> 32)
    assert torch.equal(unary("shr.s32 %r5, %r4, 40;", whole), (whole < 0).int().neg())
    assert torch.equal(unary("shr.u32 %r5, %r4, 28;", whole).long(), unsigned >> 28)
    assert torch.equal(unary("bfe.s32 %r5, %r4, 5, 3;", whole).long(), ((unsigned >> 5 & 7) ^ 4) - 4)
    assert torch.equal(unary("bfe.u32 %r5, %r4, 30, 9;", whole).long(), unsigned >> 30)
    assert torch.equal(
        unary("prmt.b32 %r5, %r4, 0, 0x4012;", whole).long(),
        (unsigned & 0xFF) << 16 | (unsigned >> 8 & 0xFF) << 8 | unsigned >> 16 & 0xFF,
    )
    assert torch.equal(unary("cvt.s64.s8 %rd4, %r4; cvt.u32.u64 %r5, %rd4;", whole), whole.to(torch.int8).int())
    real = torch.cat([torch.randn(60), torch.tensor([torch.nan, torch.inf, -0.0, 1e-40])])
    for name, want in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        rounded = unary(f"cvt.rn.{name}.f32 %rs0, %r4; cvt.f32.{name} %r5, %rs0;", real)
        torch.testing.assert_close(rounded, real.to(want).float(), rtol=0, atol=0, equal_nan=True)
    zero = torch.zeros(1)
    larger = unary("max.f32 %r5, %r4, 0f00000000;", real)
    assert torch.equal(larger, torch.where(real > 0, real, zero)) and not larger.signbit().any()
    for compares, want in (("leu", ~(real > 0)), ("ne", (real < 0) | (real > 0)), ("nan", real.isnan())):
        found = unary(f"setp.{compares}.f32 %p0, %r4, 0f00000000; selp.b32 %r5, 1, 0, %p0;", real)
        assert torch.equal(found.view(torch.int32), want.int()), compares
    assert (
        unary("add.ftz.f32 %r5, %r4, 0f00000000;", real)[63] == 0
        and unary("add.f32 %r5, %r4, 0f00000000;", real)[63] > 0
    )


def test_diverged_lanes_reconverge():
    body = """
      and.b32 %r4, %r0, 3;
      mov.b32 %r5, 0;
    $again:
      add.s32 %r5, %r5, %r4;
      sub.s32 %r4, %r4, 1;
      setp.gt.s32 %p0, %r4, 0;
      @%p0 bra $again;
      shfl.sync.bfly.b32 %r6|%p1, %r5, 1, 31, -1;
      st.global.b32 [%rd3], %r6;
    """
    sums = torch.tensor([0, 1, 3, 6])[torch.arange(64) % 4]
    assert torch.equal(run(body, torch.zeros(1, dtype=torch.int32)).long(), sums.reshape(-1, 2).flip(1).flatten())


def reversed_within(between: str) -> str:
    """Thread i of 64 stores its number, then loads that of thread 63 - i."""
    return f"""
      xor.b32 %r4, %r1, 252;
      add.s32 %r5, %r2, %r4;
      st.shared.b32 [%r3], %r0;
      {between}
      ld.shared.b32 %r6, [%r5];
      st.global.b32 [%rd3], %r6;
    """


def copied(before: str, after: str) -> str:
    """Every thread copies the first 16 bytes of the input to shared memory, and stores the first 4 of them."""
    return f"""
      shl.b32 %r4, %r0, 4;
      add.s32 %r5, %r2, %r4;
      cp.async.cg.shared.global [%r5], [%rd0], 16, 16;
      cp.async.commit_group;
      {before}
      ld.shared.b32 %r6, [%r5];
      st.global.b32 [%rd3], %r6;
      {after}
    """


def product(between: str, fence: str, meanwhile: str, stored: str = "fence.proxy.async.shared::cta;") -> str:
    """A matrix product of 64 rows and 8 rows in shared memory, with 128 bytes each, swizzled."""
    return f"""
      st.shared.b32 [%r3], %r0;
      {stored}
      bar.sync 0;
      {between}
      cvt.u64.u32 %rd5, %r2;
      shr.u64 %rd5, %rd5, 4;
      or.b64 %rd4, %rd5, 0x4000004000010000;
      {fence}
      wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%r20, %r21, %r22, %r23}}, %rd4, %rd4, 0, 1, 1, 0, 0;
      wgmma.commit_group.sync.aligned;
      {meanwhile}
      wgmma.wait_group.sync.aligned 0;
    """


def apart(instruction: str) -> str:
    """The first 7 lanes wait at one instruction for the other lanes, which wait for them at another."""
    return f"""
      setp.lt.u32 %p0, %r0, 7;
      @%p0 bra $few;
      {instruction}
      bra $all;
    $few:
      bar.warp.sync -1;
    $all:
    """


FENCE = "wgmma.fence.sync.aligned;"
REFUSED = {
    "a race": reversed_within("bar.warp.sync -1;"),
    "two threads write": "st.shared.b32 [%r2], %r0;",
    "outside of every argument": "ld.global.b32 %r4, [%rd3+65536];",
    "outside of the 8192 bytes": "ld.shared.b32 %r4, [%r3+8192];",
    "is not aligned": "ld.global.v2.b32 {%r4, %r5}, [%rd3+4];",
    "takes part in a shuffle is elsewhere": apart("shfl.sync.bfly.b32 %r5, %r0, 1, 31, -1;"),
    "are not together": apart("bar.sync 0;"),
    "before its copies were waited for": copied("", ""),
    "without a fence.proxy.async": product("", FENCE, "", stored=""),
    "begins without wgmma.fence": product("", "", ""),
    "ends before its products": product("", FENCE, "ret;"),
    "changed under a product": product("", FENCE, "st.shared.b32 [%r3], 77;"),
    "there is no instruction": "sin.approx.f32 %r4, %r0;",
    "does not end": "$on: bra $on;",
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_refuses(message, monkeypatch):
    with pytest.raises(ptx.Failure, match=message):
        run(REFUSED[message], torch.zeros(64, dtype=torch.int32), threads=128)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_barriers_and_waits_order(seed):
    given = torch.arange(64, dtype=torch.int32)
    assert torch.equal(run(reversed_within("bar.sync 0;"), given, seed=seed), given.flip(0))
    assert (run(copied("cp.async.wait_group 0;", ""), given + 5, seed=seed) == 5).all()
    assert (run(copied("", "cp.async.wait_group 0;"), given + 5, seed=seed) == -1).all(), (
        "a copy is there before it is waited for"
    )


# Every kernel of Triton with few shapes. `make ptx` runs all tests of the backend with all shapes.
ROWS = "triton and (masks_are_exact and everything or plain-none-torch.bfloat16 or everything-torch.bfloat16)"


@pytest.mark.parametrize("capability", [80, 90])
def test_triton_as_compiled(capability, tmp_path):
    """Run tests/test_kernels.py in a process where launches of Triton run as PTX for this GPU."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "NEGMINE_PTX_SHAPES": "few"}
    command = [sys.executable, "-m", "tests.ptx", str(capability), "-q", "tests/test_kernels.py", "-k", ROWS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
