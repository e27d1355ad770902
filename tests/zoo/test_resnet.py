import pytest
from parity import assert_all_kernels_are_sites, assert_original_logits, parameter_count

from jaxrmils.zoo import reference


# torchvision's documentation has these numbers of parameters.
@pytest.mark.parametrize(
    ("name", "count"), [("resnet18", 11689512), ("resnet34", 21797672), ("resnet50", 25557032)]
)
def test_parameter_count(name, count):
    assert parameter_count(name) == count


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_original_logits(name):
    assert_original_logits(name)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_every_kernel_is_a_site(name):
    assert_all_kernels_are_sites(name)


def test_other_number_of_classes():
    shapes = reference("resnet34").with_classes(7).shapes()
    assert shapes["params"]["fc"]["kernel"].shape == (512, 7)
