"""Replayed calls: the same results, new ones where something changed, none where that is impossible."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_denoiser import make_inputs, make_model
from torch import Tensor

from gspn2_diffusion.models.graphs import GraphReplay, disable_graphs, enable_graphs
from gspn2_diffusion.pipelines.low_memory import balanced_scans


class Rerun:
    """A capture for the CPU: to replay is to compute again on the same buffers, into the same result."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.captured += 1
        result = step()

        def replay() -> None:
            self.replayed += 1
            result.copy_(step())

        return replay, result


@pytest.fixture
def model() -> Any:
    return make_model(num_layers=1).eval()


def graphed(model: Any, **options: Any) -> Rerun:
    capture = Rerun()
    model.forward = GraphReplay(model, capture=capture, **options)
    return capture


@torch.no_grad()
def test_second_call_is_captured_and_others_follow_their_inputs(model: Any) -> None:
    plain, capture = copy.deepcopy(model), graphed(model)
    first = make_inputs(8, 6)
    kept = []
    for scale in (1.0, 2.0, 3.0):
        inputs = {**first, "hidden_states": first["hidden_states"] * scale}
        kept.append((model(**inputs).sample, plain(**inputs).sample))
    assert (capture.captured, capture.replayed) == (1, 2)
    for found, wanted in kept:  # all of them at the end: no result is written over
        torch.testing.assert_close(found, wanted)
    (sample,) = model(*first.values(), return_dict=False)
    torch.testing.assert_close(sample, plain(**first).sample)
    assert capture.replayed == 3
    disable_graphs(model)
    assert "forward" not in model.__dict__


@torch.no_grad()
def test_scans_in_balance_have_graphs_of_their_own(model: Any) -> None:
    plain, capture = copy.deepcopy(model), graphed(model)
    inputs = make_inputs(8, 6)
    for sizes, captured in (((16, 12), 1), ((8, 8), 2), ((16, 12), 2)):
        for _ in range(3):
            with balanced_scans(model, *sizes), balanced_scans(plain, *sizes):
                torch.testing.assert_close(model(**inputs).sample, plain(**inputs).sample)
        assert capture.captured == captured
    assert capture.replayed == 2 + 2 + 3  # a first call runs as ever, the second is captured
    torch.testing.assert_close(model(**inputs).sample, plain(**inputs).sample)  # unbalanced again


@torch.no_grad()
def test_shapes_have_graphs_of_their_own_and_the_oldest_goes(model: Any) -> None:
    plain, capture = copy.deepcopy(model), graphed(model, keep=1)
    for size in ((8, 6), (6, 8), (8, 6), (6, 8), (8, 6)):
        torch.testing.assert_close(model(**make_inputs(*size)).sample, plain(**make_inputs(*size)).sample)
    assert capture.captured == 3  # each at its second call, the first once more after it was dropped


@torch.no_grad()
def test_a_graph_is_not_used_when_something_changed(model: Any) -> None:
    capture, inputs = graphed(model), make_inputs(8, 6)
    for _ in range(3):
        before = model(**inputs).sample
    assert capture.replayed == 2
    handle = model.transformer_blocks[0].register_forward_hook(lambda *_: None)
    model(**inputs)
    handle.remove()
    model.transformer_blocks[0].ff.forward = model.transformer_blocks[0].ff.forward
    model(**inputs)
    del model.transformer_blocks[0].ff.forward
    with torch.enable_grad():
        model(**inputs)
    model(**inputs, attention_kwargs={"scale": 0.5})
    assert (capture.captured, capture.replayed) == (1, 2)
    model(**inputs)
    assert (capture.captured, capture.replayed) == (1, 3)
    model.proj_out.weight.mul_(2)  # in place: the graph reads the new values
    assert not torch.allclose(model(**inputs).sample, before)
    assert (capture.captured, capture.replayed) == (1, 4)
    model.proj_out.weight.data = model.proj_out.weight / 2  # elsewhere: seen once, then captured
    for _ in range(2):
        torch.testing.assert_close(model(**inputs).sample, before)
    assert (capture.captured, capture.replayed) == (2, 5)
    for mixer in (block.mixer for block in model.transformer_blocks):
        mixer.chunk_size = 2
    assert not torch.allclose(model(**inputs).sample, before)


@torch.no_grad()
def test_large_pictures_and_other_devices_run_as_ever(model: Any) -> None:
    capture = graphed(model, max_tokens=11)
    for _ in range(2):
        model(**make_inputs(8, 6))
    assert capture.captured == 0
    plain = copy.deepcopy(model)
    disable_graphs(plain)
    enable_graphs(model)  # the real capture, which a CPU's tensors do not reach
    for _ in range(3):
        torch.testing.assert_close(model(**make_inputs(8, 6)).sample, plain(**make_inputs(8, 6)).sample)
    clone = copy.deepcopy(model)
    assert clone.__dict__["forward"]._model is clone


@torch.no_grad()
def test_a_failing_capture_costs_a_warning(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    plain = copy.deepcopy(model)

    def refuse(_: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    model.forward = GraphReplay(model, capture=refuse)
    inputs = make_inputs(8, 6)
    for _ in range(4):
        torch.testing.assert_close(model(**inputs).sample, plain(**inputs).sample)
    assert len([line for line in caplog.messages if "not permitted" in line]) == 1


@pytest.mark.gpu
@torch.no_grad()
def test_replayed_on_a_gpu() -> None:
    plain = make_model().eval().to("cuda")
    model = copy.deepcopy(plain)
    enable_graphs(model)
    for scale in (1.0, 2.0, 3.0, 4.0):
        for size in ((16, 16), (8, 24)):
            inputs = {name: value.cuda() for name, value in make_inputs(*size).items()}
            inputs["hidden_states"] *= scale
            torch.testing.assert_close(model(**inputs).sample, plain(**inputs).sample, atol=1e-5, rtol=1e-5)
    assert len(model.__dict__["forward"]._graphs) == 2
