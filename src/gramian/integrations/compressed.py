"""Factored models in transformers: after this import, `from_pretrained` loads a folder of `save_compressed`.

    import gramian.integrations.compressed
    model = AutoModel.from_pretrained("small")

The import registers the quantization method `gramian` with transformers, as its own extension point has it, and changes
nothing else. Without it `from_pretrained` raises: the folder's tensors do not fit a dense model. A folder that was
loaded is an ordinary model, which trains, is cast, and is saved by `save_pretrained`.
"""

from __future__ import annotations

from gramian.integrations.extras import load

load("transformers", "hf")

from gramian.compression.storage.pretrained import METHOD, FactoredConfig, FactoredQuantizer  # noqa: E402

__all__ = ["METHOD", "FactoredConfig", "FactoredQuantizer"]
