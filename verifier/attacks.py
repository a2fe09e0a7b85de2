"""The attack suite: what a malicious worker may send instead of its output. One small class per attack.

An attack sees what one worker sees: its honest output, what it received, and a dict to remember things in. The same
classes run in the mesh experiment and inside a live (testbed) node. Names and the seven base types are the paper's
(section 5, "attacks"); where the paper's formula is not known, the docstring states the one used here.

Shapes: `output` and `view.inputs` are one microbatch of one worker, (B, T, W) = (batch, tokens, width), fp32.
A result of another shape counts as *not sent*: an attack that withholds returns an empty tensor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor, nn

from verifier.streams import Direction, Peer, StageIndex


@dataclass(frozen=True)
class View:
    """What an attacker knows at the moment of sending. `state` lives as long as the worker, one dict per direction.

    `with_older_weights(n)` is the worker's output computed honestly on the weights of n versions ago; the host can
    give it for attacks that say so in `weight_memory`.
    """

    direction: Direction
    stage: StageIndex
    round: int
    microbatch: int
    peer: Peer
    inputs: Tensor
    state: dict[str, Any]
    with_older_weights: Callable[[int], Tensor] | None = None


class Attack:
    """Base of the suite. Parameters are keyword arguments; equal seeds give colluders equal corruptions."""

    weight_memory: int = 0
    """How many old weights versions the host must keep for this attack."""

    def __init__(self, *, seed: int) -> None:
        self.seed = seed

    def corrupt(self, output: Tensor, view: View) -> Tensor:
        """What is sent in place of `output`. Must not write into `output`."""
        raise NotImplementedError

    def watch(self, output: Tensor, view: View) -> None:
        """Called instead of `corrupt` while the attack rests (before its start, between duties), to prepare it."""

    def random(self, view: View) -> torch.Generator:
        """Fresh randomness that colluders (equal seeds) share: one stream of numbers per stage, direction and round."""
        key = f"{self.seed}/{view.stage}/{view.direction}/{view.round}".encode()
        return torch.Generator().manual_seed(int.from_bytes(blake3(key).digest(length=8), "little"))


def _normal(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


class Constant(Attack):
    """x <- c everywhere."""

    def __init__(self, *, seed: int, value: float = 1.0) -> None:
        super().__init__(seed=seed)
        self.value = value

    def corrupt(self, output: Tensor, view: View) -> Tensor:
        return torch.full_like(output, self.value)


class Zeros(Constant):
    """x <- 0."""

    def __init__(self, *, seed: int) -> None:
        super().__init__(seed=seed, value=0.0)


class Random(Attack):
    """x <- Gaussian noise of the output's own mean and standard deviation, so that its size gives nothing away."""

    def corrupt(self, output: Tensor, view: View) -> Tensor:
        return output.mean() + output.std() * _normal(output.shape, self.random(view))


class Scale(Attack):
    """x <- factor * x."""

    def __init__(self, *, seed: int, factor: float = 2.0) -> None:
        super().__init__(seed=seed)
        self.factor = factor

    def corrupt(self, output: Tensor, view: View) -> Tensor:
        return self.factor * output


class Flip(Scale):
    """x <- -x."""

    def __init__(self, *, seed: int) -> None:
        super().__init__(seed=seed, factor=-1.0)


class RandomSign(Attack):
    """Flips the sign of a random fraction of the elements."""

    def __init__(self, *, seed: int, fraction: float = 0.5) -> None:
        super().__init__(seed=seed)
        self.fraction = fraction

    def corrupt(self, output: Tensor, view: View) -> Tensor:
        flipped = torch.rand(output.shape, generator=self.random(view)) < self.fraction
        return torch.where(flipped, -output, output)


class Delay(Attack):
    """Sends its own output of `rounds` rounds ago, or the oldest it remembers."""

    def __init__(self, *, seed: int, rounds: float = 100) -> None:
        super().__init__(seed=seed)
        self.rounds = int(rounds)

    def watch(self, output: Tensor, view: View) -> None:
        memory: deque[tuple[int, Tensor]] = view.state.setdefault("sent", deque())
        memory.append((view.round, output.clone()))
        while len(memory) > 1 and memory[1][0] <= view.round - self.rounds:
            memory.popleft()

    def corrupt(self, output: Tensor, view: View) -> Tensor:
        self.watch(output, view)
        oldest: Tensor = view.state["sent"][0][1]
        return oldest.clone()


class Bias(Attack):
    """x <- x + b: every element is shifted by `deviations` standard deviations of the output."""

    def __init__(self, *, seed: int, deviations: float = 1.0) -> None:
        super().__init__(seed=seed)
        self.deviations = deviations

    def corrupt(self, output: Tensor, view: View) -> Tensor:
        return output + self.deviations * output.std()


class Noise(Attack):
    """x <- x + Gaussian noise of `deviations` standard deviations of the output."""

    def __init__(self, *, seed: int, deviations: float = 1.0) -> None:
        super().__init__(seed=seed)
        self.deviations = deviations

    def corrupt(self, output: Tensor, view: View) -> Tensor:
        return output + self.deviations * output.std() * _normal(output.shape, self.random(view))


class Drift(Attack):
    """A bias along one fixed random direction that grows by `deviations` standard deviations every 100 outputs."""

    def __init__(self, *, seed: int, deviations: float = 0.5) -> None:
        super().__init__(seed=seed)
        self.deviations = deviations

    def corrupt(self, output: Tensor, view: View) -> Tensor:
        sent = view.state["sent"] = view.state.get("sent", 0) + 1
        generator = torch.Generator().manual_seed(self.seed)
        direction = torch.randn(output.shape[-1], generator=generator)
        drifted: Tensor = output + self.deviations * sent / 100 * output.std() * direction
        return drifted


class _KnowsTheStream(Attack):
    """Keeps what a detector of marginals keeps: the EMA (T, W) of the worker's honest outputs."""

    memory = 0.9

    def watch(self, output: Tensor, view: View) -> None:
        mean = output.mean(0)
        known: Tensor | None = view.state.get("ema")
        keep = self.memory if known is not None and known.shape == mean.shape else 0.0
        view.state["ema"] = mean if keep == 0.0 or known is None else keep * known + (1 - keep) * mean


class InvisibleNoise(_KnowsTheStream):
    """Noise that stays inside the `quantile` of the stream's own honest deviation, element by element.

    x <- clamp(x + u, m - q, m + q), with m the EMA, q the quantile of |x - m| and u uniform in [-2q, 2q].
    """

    def __init__(self, *, seed: int, quantile: float = 0.99) -> None:
        super().__init__(seed=seed)
        self.quantile = quantile

    def corrupt(self, output: Tensor, view: View) -> Tensor:
        self.watch(output, view)
        mean = view.state["ema"]
        deviation = (output - mean).abs().flatten()
        bound = deviation.kthvalue(max(1, int(self.quantile * deviation.numel()))).values
        uniform = 2 * torch.rand(output.shape, generator=self.random(view)) - 1
        return torch.clamp(output + 2 * bound * uniform, mean - bound, mean + bound)


class AdaptiveEma(_KnowsTheStream):
    """Knows the paper's detector: mirrors its output at the EMA and stays at `fraction` of the Tukey fence.

    x <- m - r (x - m) / |x - m|, with r = `fraction` x (Q3 + 1.5 IQR) of the honest distances |x - m| so far.
    """

    def __init__(self, *, seed: int, fraction: float = 0.9) -> None:
        super().__init__(seed=seed)
        self.fraction = fraction

    def watch(self, output: Tensor, view: View) -> None:
        super().watch(output, view)
        distances: deque[float] = view.state.setdefault("distances", deque(maxlen=100))
        distances.append(float((output - view.state["ema"]).norm()))

    def corrupt(self, output: Tensor, view: View) -> Tensor:
        self.watch(output, view)
        low, high = torch.tensor(list(view.state["distances"])).quantile(torch.tensor([0.25, 0.75])).tolist()
        fence = high + 1.5 * (high - low)
        away = output - view.state["ema"]
        mirrored: Tensor = view.state["ema"] - self.fraction * fence * away / away.norm().clamp_min(1e-30)
        return mirrored


class Mlp(Attack):
    """A freeloader: a small net per token, trained on its own honest work while resting, then sent in its place.

    It goes on learning from each output that it replaces, which flatters it: a real one would have to pay for those.
    """

    hidden = 32

    def __init__(self, *, seed: int, steps: float = 2) -> None:
        super().__init__(seed=seed)
        self.steps = int(steps)

    def watch(self, output: Tensor, view: View) -> None:
        with torch.enable_grad():
            net, optimizer = self._student(view, output.shape[-1])
            spread = view.inputs.std().clamp_min(1e-30)
            for _ in range(self.steps):
                optimizer.zero_grad()
                error = (net(view.inputs / spread) - (output - view.inputs) / spread).square().mean()
                error.backward()
                optimizer.step()

    def corrupt(self, output: Tensor, view: View) -> Tensor:
        net, _ = self._student(view, output.shape[-1])
        spread = view.inputs.std().clamp_min(1e-30)
        with torch.no_grad():
            imitation: Tensor = view.inputs + spread * net(view.inputs / spread)
        self.watch(output, view)
        return imitation

    def _student(self, view: View, width: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        if "student" not in view.state:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                net = nn.Sequential(nn.Linear(width, self.hidden), nn.SiLU(), nn.Linear(self.hidden, width))
            view.state["student"] = net, torch.optim.Adam(net.parameters(), lr=3e-3)
        student: tuple[nn.Module, torch.optim.Optimizer] = view.state["student"]
        return student


class Stale(Attack):
    """Honest code on weights `versions` old: a worker that does not bother to take part in the rounds."""

    def __init__(self, *, seed: int, versions: float = 20) -> None:
        super().__init__(seed=seed)
        self.weight_memory = int(versions)

    def corrupt(self, output: Tensor, view: View) -> Tensor:
        if view.with_older_weights is None:
            raise ValueError("the host keeps no old weights for `stale`")
        return view.with_older_weights(self.weight_memory)


class Partial(Attack):
    """Replaces only a fraction of the tokens, by noise of the output's own spread."""

    def __init__(self, *, seed: int, fraction: float = 0.1) -> None:
        super().__init__(seed=seed)
        self.fraction = fraction

    def corrupt(self, output: Tensor, view: View) -> Tensor:
        generator = self.random(view)
        hit = torch.rand(output.shape[:-1], generator=generator) < self.fraction
        return torch.where(hit[..., None], output.std() * _normal(output.shape, generator), output)


class Nan(Attack):
    """One element of the output is not a number."""

    def corrupt(self, output: Tensor, view: View) -> Tensor:
        broken = output.clone()
        broken.view(-1)[0] = torch.nan
        return broken


class Withhold(Attack):
    """Sends nothing for a fraction of its microbatches."""

    def __init__(self, *, seed: int, fraction: float = 0.5) -> None:
        super().__init__(seed=seed)
        self.fraction = fraction

    def corrupt(self, output: Tensor, view: View) -> Tensor:
        silent = torch.rand((), generator=self.random(view)) < self.fraction
        return output.new_empty(0) if silent else output


class Replay(Attack):
    """Sends again the first output that it ever made for an attacked microbatch."""

    def watch(self, output: Tensor, view: View) -> None:
        if view.state.get("shape") != output.shape:
            view.state["shape"], view.state["first"] = output.shape, output.clone()

    def corrupt(self, output: Tensor, view: View) -> Tensor:
        self.watch(output, view)
        first: Tensor = view.state["first"]
        return first.clone()


class Mixed(Attack):
    """Each attacker has one of the paper's types, chosen by its seed."""

    kinds: tuple[tuple[type[Attack], dict[str, float]], ...] = (
        (Zeros, {}),
        (Random, {}),
        (Flip, {}),
        (RandomSign, {}),
        (Delay, {}),
        (Bias, {}),
        (InvisibleNoise, {}),
    )

    def __init__(self, *, seed: int) -> None:
        super().__init__(seed=seed)
        kind, params = self.kinds[seed % len(self.kinds)]
        self.chosen = kind(seed=seed, **params)

    def watch(self, output: Tensor, view: View) -> None:
        self.chosen.watch(output, view)

    def corrupt(self, output: Tensor, view: View) -> Tensor:
        return self.chosen.corrupt(output, view)
