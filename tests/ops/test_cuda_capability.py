"""The GPUs that a compiled CUDA library has code for; the chooser asks (test_chooser.py)."""

import pytest

from realign_fast.ops.chooser import why_no_code

BUILT = "80 90 100"
T4, V100, A100, L4, H100 = (7, 5), (7, 0), (8, 0), (8, 9), (9, 0)


@pytest.mark.parametrize(
    ("architectures", "capability", "reason"),
    [
        (BUILT, A100, ""),
        (BUILT, L4, ""),  # machine code of sm_80 runs on all of 8.x
        (BUILT, H100, ""),
        (BUILT, (10, 0), ""),
        (BUILT, (12, 0), ""),  # from the PTX of sm_100
        (BUILT, T4, "compiled for sm_80, sm_90, sm_100, and a GPU here is sm_75; .* need sm_80"),
        (BUILT, V100, "a GPU here is sm_70; the CUDA kernels need sm_80 or later"),
        ("90", A100, "for sm_90, and a GPU here is sm_80; .* REALIGN_FAST_CUDA_ARCHS=80$"),
        ("90", (10, 0), ""),
        ("80 100", H100, "sm_100, and a GPU here is sm_90"),  # only the last one has PTX
        ("89", (8, 6), "a GPU here is sm_86"),
        ("89", A100, "a GPU here is sm_80"),
        ("90a", H100, ""),
        ("90a", (10, 0), "for sm_90a, and a GPU here is sm_100"),
        ("100f", (10, 3), ""),
        ("100f", (12, 0), "a GPU here is sm_120"),
        ("90a 100", (12, 0), ""),
    ],
)
def test_what_code_runs_on_which_gpu(architectures, capability, reason):
    found = why_no_code(architectures.split(), capability)
    if reason:
        with pytest.raises(RuntimeError, match=reason):
            raise RuntimeError(found)
    else:
        assert found == ""


def test_a_library_of_unknown_architectures_is_trusted():
    assert why_no_code([], T4) == ""
