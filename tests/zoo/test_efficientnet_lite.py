import pytest
from parity import assert_all_kernels_are_sites, assert_original_logits, parameter_count

from jaxrmils.zoo import reference


# Counted in the state dicts of efficientnet-lite-pytorch.
@pytest.mark.parametrize(
    ("name", "count", "size"),
    [
        ("efficientnet_lite0", 4652008, 224),
        ("efficientnet_lite1", 5416680, 240),
        ("efficientnet_lite2", 6092072, 260),
        ("efficientnet_lite3", 8197096, 280),
        ("efficientnet_lite4", 13006568, 300),
    ],
)
def test_parameter_count_and_resolution(name, count, size):
    assert parameter_count(name) == count
    assert reference(name).input_size == size


@pytest.mark.parametrize("name", ["efficientnet_lite0", "efficientnet_lite1"])
def test_original_logits(name):
    assert_original_logits(name)


def test_every_kernel_is_a_site():
    assert_all_kernels_are_sites("efficientnet_lite0")


def test_stem_and_head_are_not_scaled():
    for number in range(5):
        params = reference(f"efficientnet_lite{number}").shapes()["params"]
        assert params["_conv_stem"]["kernel"].shape == (3, 3, 3, 32)
        assert params["_conv_head"]["kernel"].shape[-1] == 1280
