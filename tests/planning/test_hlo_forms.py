"""Forms of program text that are easy to misread: groups, lines within attributes, conditionals."""

import pytest

from hrvlm_jax.planning import groups, hlo


@pytest.mark.parametrize(
  'text, expected',
  [
    ("mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    # Numbers 0..7 in 4 x 2, axes exchanged: 0 2 4 6 1 3 5 7 are the devices of the mesh in order.
    ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
    ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
    ("mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'b'}", [[3, 1], [2, 0]]),
    ("mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
    # The minor half of an axis of 4, then its major half.
    ("mesh['a'=4,'b'=2] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ("mesh['a'=4,'b'=2] {'a':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ('[2,2]<=[2,2]T(1,0)', [[0, 2], [1, 3]]),
    ('{{0,1},{2,3}}', [[0, 1], [2, 3]]),
  ],
)
def test_groups(text, expected):
  found = groups.groups_of(f', channel_id=1, replica_groups={text}, dimensions={{0}}', 64)
  assert sorted(map(sorted, found)) == sorted(map(sorted, expected))
  assert groups.group_size(found) == len(expected[0])


def test_groups_of_a_mesh_in_an_unknown_order_have_their_size():
  found = groups.groups_of("replica_groups=mesh['a'=4,'b'=16], device_ids=(?) {'b'}", 64)
  assert found == (16,) and groups.group_size(found) == 16


KERNEL = """HloModule m, is_scheduled=true, num_partitions=8

ENTRY %main (a: bf16[8,8]) -> bf16[8,8] {
  %a = bf16[8,8]{1,0} parameter(0)
  %k = bf16[8,8]{1,0} custom-call(%a), frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 1024}"
}}, metadata={op_name="k"}
  %g = bf16[8,8]{1,0} get-tuple-element(%k), index=0, frontend_attributes={kernel_metadata={
"xprof_metadata":"{"
}}
  ROOT %d = bf16[8,8]{1,0} dot(%g, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%after (b: bf16[8,8]) -> bf16[8,8] {
  ROOT %b = bf16[8,8]{1,0} parameter(0)
}
"""


def test_lines_of_kernel_metadata_end_no_computation():
  module = hlo.Module.parse(KERNEL)
  assert [i.name for i in module.computations['main']] == ['a', 'k', 'g', 'd']
  assert set(module.computations) == {'main', 'after'} and module.partitions == 8
  kernel = module.computations['main'][1]
  assert 'block_q' in kernel.attributes and 'op_name="k"' in kernel.attributes
  assert module.matrix_flops() == 2 * 8**3


@pytest.mark.parametrize(
  'attributes',
  [
    'branch_computations={%f, %g}',
    'branch_computations={f, g}',
    'true_computation=%f, false_computation=%g',
  ],
)
def test_branches_of_conditionals(attributes):
  assert [name for _, name in hlo.callees(f', {attributes}')] == ['f', 'g']
