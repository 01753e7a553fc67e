"""The totals of a small module's text are those that were counted by hand."""

import pytest

from mask2dit_jax.aot import hlo

# A loop of 42 iterations over a fused matrix product, an all-reduce, a fused reduce-scatter and a
# kernel, and an all-gather after the loop.
TEXT = """HloModule test

%body (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p = (s32[], bf16[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[8,16]{1,0} get-tuple-element(%p), index=1
  %w = bf16[16,16]{1,0} constant({...})
  %y = bf16[8,16]{1,0} fusion(%x, %w), kind=kOutput, calls=%fused, \
backend_config={"estimated_cycles":"100"}
  %z = bf16[8,16]{1,0} all-reduce(%y), replica_groups={{0,1}}, to_apply=%add, \
metadata={op_name="jit(f)/sum"}
  %s = bf16[4,16]{1,0} fusion(%z), kind=kCustom, calls=%all-reduce-scatter.1, \
backend_config={"estimated_cycles":"7"}
  %k = (bf16[2,8,4]{2,1,0}, f32[2]{0}) custom-call(%x), custom_call_target="tpu_custom_call"
  ROOT %t = (s32[], bf16[8,16]{1,0}) tuple(%i, %z)
}

%fused (a: bf16[8,16], b: bf16[16,16]) -> bf16[8,16] {
  %a = bf16[8,16]{1,0} parameter(0)
  %b = bf16[16,16]{1,0} parameter(1)
  ROOT %c = bf16[8,16]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}

%all-reduce-scatter.1 (d: bf16[8,16]) -> bf16[4,16] {
  %d = bf16[8,16]{1,0} parameter(0)
  %e = bf16[8,16]{1,0} all-reduce(%d), replica_groups={{0,1}}, to_apply=%add
  ROOT %f = bf16[4,16]{1,0} dynamic-slice(%e), dynamic_slice_sizes={4,16}
}

%condition (q: (s32[], bf16[8,16])) -> pred[] {
  %q = (s32[], bf16[8,16]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %n = s32[] constant(42)
  ROOT %lt = pred[] compare(%j, %n), direction=LT
}

ENTRY %main (x: bf16[8,16]) -> bf16[16,16] {
  %x.1 = bf16[8,16]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[8,16]{1,0}) tuple(%zero, %x.1)
  %loop = (s32[], bf16[8,16]{1,0}) while(%start), condition=%condition, body=%body
  %out = bf16[8,16]{1,0} get-tuple-element(%loop), index=1
  ROOT %g = bf16[16,16]{1,0} all-gather(%out), dimensions={0}
}
"""


def test_loops_count_in_full():
    program = hlo.analyze(TEXT)
    assert program.flops == 42 * 2 * 8 * 16 * 16
    assert program.cycles == {'dense': 4200, 'rest': 294}
    assert program.kernels == {('k', (2, 8, 4)): 42}
    assert program.collectives == {
        'all-reduce': hlo.Collective(times=42, bytes=42 * 256),
        'reduce-scatter': hlo.Collective(times=42, bytes=42 * 256),
        'all-gather': hlo.Collective(times=1, bytes=512),
    }
    assert program.loop_all_reduces == [(256, 'jit(f)/sum')]


def test_strange_text_is_refused():
    with pytest.raises(ValueError, match='no ENTRY computation'):
        hlo.analyze('module {}')
    with pytest.raises(ValueError, match='without a plain trip count'):
        hlo.analyze(TEXT.replace('constant(42)', 'parameter(1)'))
