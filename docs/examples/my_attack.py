"""An attack of one's own: sentinel-node simulate --attack docs/examples/my_attack.py:SwapHalves"""

from torch import Tensor

from verifier.attacks import View


class SwapHalves:
    """Swaps the halves of the hidden vector, in every `every`-th round, so that all statistics of the values stay."""

    def __init__(self, *, seed: int, every: float = 1) -> None:
        self.every = int(every)

    def corrupt(self, output: Tensor, view: View) -> Tensor:
        if view.round % self.every:
            return output
        view.state["swaps"] = view.state.get("swaps", 0) + 1
        return output.roll(output.shape[-1] // 2, dims=-1)
