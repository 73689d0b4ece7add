"""What is said where the compiled library and the running torch do not belong together."""

import os

import pytest
import torch

import coda_attn
from coda_attn import _build_info, _library


@pytest.fixture(params=["", "13"], ids=["cpu", "cuda"])
def built_for(request, monkeypatch):
    monkeypatch.setattr(_build_info, "TORCH_VERSION", "2.11")
    monkeypatch.setattr(_build_info, "CUDA_VERSION", request.param)
    return request.param


def test_the_running_torch_is_accepted():
    assert _library.mismatch(torch.__version__, torch.version.cuda) is None


def test_another_patch_release_is_accepted(built_for):
    assert _library.mismatch("2.11.3", "13.0") is None


@pytest.mark.parametrize("found", ["2.1.1", "2.12.0", "3.11.0"])
def test_another_minor_release_is_refused_in_one_sentence(built_for, found):
    message = _library.mismatch(found + "+cu130", "13.0")
    assert "torch 2.11" in message and found in message and "make build" in message
    assert "\n" not in message


@pytest.mark.parametrize("cuda", [None, "12.6"])
def test_cuda_kernels_need_their_own_cuda(built_for, cuda):
    message = _library.mismatch("2.11.0", cuda)
    assert (message is None) == (built_for == "")
    if message:
        assert "CUDA 13" in message and (cuda or "without CUDA") in message


def test_a_cpp_project_finds_the_package():
    assert os.path.isfile(os.path.join(coda_attn.cmake_prefix_path, "lib", "cmake", "coda", "codaConfig.cmake"))
    assert coda_attn.__version__ == _build_info.VERSION
