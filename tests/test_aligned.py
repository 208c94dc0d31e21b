from hypothesis import given
from hypothesis import strategies as st

from cnnjax import aligned

TEXT = st.text("abc1", max_size=6)


@given(
    st.integers(1, 5).flatmap(
        lambda n: st.lists(st.lists(TEXT, min_size=n, max_size=n), min_size=1)
    )
)
def test_columns_are_as_wide_as_their_longest_cell(rows):
    cells = aligned.padded(rows, "lr")
    for column, found in zip(zip(*rows, strict=True), zip(*cells, strict=True), strict=True):
        assert {len(each) for each in found} == {max(map(len, column))}
        assert [each.strip() for each in found] == list(column)
    for row, found in zip(rows, cells, strict=True):
        assert found[0].startswith(row[0])
        assert all(made.endswith(text) for text, made in zip(row[1:], found[1:], strict=True))


def test_a_table_is_ruled_below_its_head():
    rows = [("layer", "kind", "MACs"), ("conv1", "Conv", "86,400"), ("pool", "Pool", "")]
    assert aligned.lines(rows, "llr", ruled=True) == [
        "layer  kind    MACs",
        "-------------------",
        "conv1  Conv  86,400",
        "pool   Pool",
    ]
    assert aligned.lines(rows, "l")[0] == "layer  kind  MACs"
