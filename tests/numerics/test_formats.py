import pytest

from jaxrmils.numerics import BITS, ROUNDINGS, code_range


def test_code_ranges():
    assert BITS == (8, 4)
    assert [code_range(bits, True) for bits in BITS] == [(-127, 127), (-7, 7)]
    assert [code_range(bits, False) for bits in BITS] == [(-128, 127), (-8, 7)]


def test_affine_formats_have_all_codes_and_symmetric_ones_one_less():
    for bits in BITS:
        for symmetric in (True, False):
            qmin, qmax = code_range(bits, symmetric)
            assert qmax - qmin + 1 == 2**bits - symmetric


@pytest.mark.parametrize("bits", [0, 2, 16, 4.5])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match="8 or 4 bits"):
        code_range(bits, True)


def test_rounding_names():
    assert ROUNDINGS == ("nearest", "floor", "ceil", "stochastic")
