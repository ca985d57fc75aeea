"""A denoiser of the speed that its arithmetic allows: blocks compiled, calls replayed as CUDA graphs."""

from __future__ import annotations

from typing import Any

from gspn2_diffusion.models import graphs


class FastDenoiserMixin:
    """Two methods of the GSPN-2 pipelines; the pipeline has a ``transformer``."""

    transformer: Any

    def enable_fast_denoiser(
        self,
        compile_blocks: bool = True,
        cuda_graphs: bool = True,
        max_tokens: int = graphs.MAX_TOKENS,
        **compile_options: Any,
    ) -> None:
        """Make every later call faster at the price of a slow first one for each size.

        Compiling fuses what surrounds the scans and the matrix products: norms with modulation, gates with
        residuals, the feed-forward's activation with its product. All blocks share one compilation. A CUDA
        graph then launches the whole denoiser at once; it is made at the second step of a size, and calls
        that cannot use one (see ``gspn2_diffusion.models.graphs.GraphReplay``) run without.

        Args:
            compile_blocks: compile the repeated blocks; takes seconds, once for each size.
            cuda_graphs: replay calls as CUDA graphs.
            max_tokens: largest batch times tokens for which a graph is made.
            compile_options: for ``torch.compile``; ``fullgraph=True`` unless it says otherwise.

        Raises:
            ValueError: the denoiser is not on a CUDA GPU, or neither of the two is asked for.
        """
        if not (compile_blocks or cuda_graphs):
            raise ValueError("`compile_blocks` and `cuda_graphs` are both False; at least one is needed")
        device = self.transformer.device
        if device.type != "cuda":
            raise ValueError(
                f"the denoiser is on {device}, but only on a CUDA GPU can it be made faster; "
                "move the pipeline there first"
            )
        if compile_blocks:
            self.transformer.compile_repeated_blocks(**{"fullgraph": True, **compile_options})
        if cuda_graphs:
            graphs.enable_graphs(self.transformer, max_tokens)

    def disable_fast_denoiser(self) -> None:
        """Undo :meth:`enable_fast_denoiser`."""
        graphs.disable_graphs(self.transformer)
        for module in self.transformer.modules():
            module._compiled_call_impl = None
