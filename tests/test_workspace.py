"""Memory that is used again: one buffer a name and thread, never one that outlives its use unseen."""

import threading

import torch

from gramian.linalg.engine import workspace
from gramian.linalg.engine.workspace import scratch

LIKE = torch.zeros(1)


def test_the_same_memory_comes_again() -> None:
    workspace.release()
    first = scratch("a", (4, 300), torch.float32, LIKE)
    assert scratch("a", (2, 100), torch.bfloat16, LIKE).data_ptr() == first.data_ptr()
    assert scratch("b", (4, 300), torch.float32, LIKE).data_ptr() != first.data_ptr()
    larger = scratch("a", (5, 300), torch.float32, LIKE)
    assert larger.shape == (5, 300)
    assert larger.is_contiguous()
    # The smaller one is a part of the larger one from then on.
    assert scratch("a", (4, 300), torch.float32, LIKE).data_ptr() == larger.data_ptr()


def test_threads_have_their_own() -> None:
    mine, theirs = scratch("a", (100,), torch.float32, LIKE), []
    thread = threading.Thread(target=lambda: theirs.append(scratch("a", (100,), torch.float32, LIKE)))
    thread.start()
    thread.join()
    assert theirs[0].data_ptr() != mine.data_ptr()


def test_what_inference_mode_asked_for_can_be_written_outside() -> None:
    workspace.release()
    with torch.inference_mode():
        scratch("a", (10,), torch.float32, LIKE).fill_(1.0)
    scratch("a", (10,), torch.float32, LIKE).fill_(2.0)
    with torch.no_grad():
        assert scratch("a", (10,), torch.float32, LIKE).add_(1.0).tolist() == [3.0] * 10


def test_what_is_very_large_or_elsewhere_is_new() -> None:
    number = workspace.MOST_BYTES // 4 + 1
    first = scratch("a", (number,), torch.float32, LIKE)
    assert scratch("a", (number,), torch.float32, LIKE).data_ptr() != first.data_ptr()
    assert scratch("a", (number,), torch.float32, LIKE.to("meta")).device.type == "meta"
