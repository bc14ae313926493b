from harness.testing import check_technique, run_once, small_dataset
from harness_example_plugin import NoisyGradient


def test_keeps_the_rules():
    assert check_technique(NoisyGradient) == []


def test_without_noise_it_is_the_plain_gradient():
    from harness.models import load_model
    from harness.registry import load_registry
    from harness_saliency import Saliency

    model, data = load_model("digits_cnn", load_registry()), small_dataset(3)
    ours = run_once(NoisyGradient(noise=0, samples=2), model, data).artifacts[0].data
    assert abs(ours - run_once(Saliency(), model, data).artifacts[0].data).max() < 1e-6
