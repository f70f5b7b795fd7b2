"""The table of ops in kernels/README.md agrees with the declarations in negmine/ops."""

from build_tools.op_table import README, op_table, with_table
from negmine.ops.registry import OPS


def test_the_table_matches_the_declarations():
    text = README.read_text()
    assert text == with_table(text, op_table()), "run python -m build_tools.op_table"


def test_every_op_is_in_the_table_with_its_meaning():
    table = op_table()
    for op in OPS.values():
        assert f"    {op.name}(" in table
        assert all(line.strip() in table for line in op.meaning.splitlines())
