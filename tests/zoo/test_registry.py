import pytest

from jaxrmils.zoo import reference, reference_names


def test_names_are_those_of_the_entries():
    assert [reference(name).name for name in reference_names()] == list(reference_names())


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="'resnet99'; expected one of resnet18, resnet34"):
        reference("resnet99")
