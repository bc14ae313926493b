from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import model_validator

from harness import Curve, Metric, NotApplicable, Paper, Param, Result, Table, Technique

from .shared import interval, rate

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness import Context

Noise = Literal["none", "random", "gaussian", "fgsm", "pgd"]
WORDS = {
    "none": "none",
    "random": "random signs",
    "gaussian": "Gaussian",
    "fgsm": "one step from a random start",
    "pgd": "seven projected steps",
}


class AdversarialTraining(Technique):
    """Four questions about training on changed pictures: which changes help, which budget, what it does to clean accuracy, when it is
    enough. Networks of the model's architecture are trained anew on the dataset, on its pictures as they are, with random changes, or
    with those found by one signed step (Wong et al. 2020, arXiv:2001.03994) or by several (min E max L, Madry et al. 2017,
    arXiv:1706.06083), and each is attacked on pictures kept apart.

    Every fifth picture is kept for the test. All networks start from the same weights and see the pictures in the same order; they are
    judged by 20 projected gradient steps. For small networks and pictures: cost is that of training about `noises` + `budgets`
    networks for `epochs`, adversarial ones eight times as long as plain ones.
    """

    name = "adversarial_training"
    family = "adversarial"
    paper = Paper("Madry, Makelov, Schmidt, Tsipras, Vladu", 2017, "Towards Deep Learning Models Resistant to Adversarial Attacks",
                  arxiv="1706.06083")  # fmt: skip
    needs = frozenset({"dataset", "labels", "classifier"})
    reading = (
        "First plot: accuracy under attack of networks trained on different changes; those that hold were trained on attacks. Second: "
        "the same for budgets of training. Third: what each budget costs on untouched pictures. Fourth: accuracy epoch by epoch; "
        "training is enough when the attacked line no longer rises."
    )
    caveats = (
        "Judged by one attack: stronger ones may break more. The numbers are those of networks trained here for comparison, one of each, "
        "and not of the model as it was given; another seed moves them."
    )

    noises: tuple[Noise, ...] = Param(("none", "random", "gaussian", "fgsm", "pgd"), min_length=1, description="changes trained on")
    eps: float = Param(32.0, gt=0, le=255, description="budget of the changes in L-inf, in 255ths")
    budgets: tuple[float, ...] = Param((8, 16, 32, 64), description="budgets of training that are compared, in 255ths")
    epochs: int = Param(30, ge=1, le=10_000, description="passes over the pictures")
    batch: int = Param(64, ge=1, description="pictures a step")
    learning_rate: float = Param(0.05, gt=0, le=10, description="highest rate; it rises for half of the steps and falls then")
    steps: int = Param(7, ge=1, le=1000, description="steps of the attack trained on")
    step_size: float = Param(0.25, gt=0, le=2, description="length of each, as a share of the budget")

    @model_validator(mode="after")
    def _consistent(self) -> AdversarialTraining:
        if any(not 0 < b <= 255 for b in self.budgets):
            raise ValueError("budgets lie above 0 and go up to 255")
        return self

    def run(self, ctx: Context) -> Result:
        import torch

        from harness.context import to_images

        labels, data, model = ctx.labels, ctx.dataset, ctx.model
        assert labels is not None
        if len(data) < 10:
            raise NotApplicable(f"needs at least ten pictures, eight to train on and two to judge; there are {len(data)}")
        images = to_images(data.pictures(model.input), ctx.device)
        place = np.arange(len(data)) % 5 == 4
        test = torch.from_numpy(place).to(ctx.device)
        split = (images[~test], labels[~test], images[test], labels[test])
        blank = fresh(model.module, ctx.seed)
        wanted = [self._plan(noise, self.eps) for noise in dict.fromkeys(self.noises)]
        rest = [self._plan("pgd", b) for b in dict.fromkeys(self.budgets)]
        plans = dict((*wanted, *rest))
        trained: dict[str, Trained] = {}
        with torch.enable_grad():
            for done, (key, plan) in enumerate(plans.items()):
                trained[key] = self._trained(ctx, blank, plan, split, watch=key in ("none", self._plan("pgd", self.eps)[0]))
                ctx.report("networks", done + 1, len(plans))

        # Measured budgets reach beyond the one trained on, and always hold those asked about.
        reach = sorted({0.0, *(self.eps * f for f in (0.25, 0.5, 0.75, 1, 1.5)), *self.budgets})
        x, y = split[2:]
        curves = {key: [self._accuracy(ctx, t.module, x, y, e) for e in reach] for key, t in trained.items()}
        mean = {key: [float(h.mean()) for h in hits] for key, hits in curves.items()}
        names = {noise: self._plan(noise, self.eps)[0] for noise in dict.fromkeys(self.noises)}
        at = reach.index(self.eps)
        words = "eps of the attack in 255ths (L-inf)"
        budgets = {b: self._plan("pgd", b)[0] for b in sorted(set(self.budgets))}
        artifacts: list[Any] = [
            Curve("which_noise", reach, {WORDS[n]: mean[key] for n, key in names.items()}, words, "accuracy",
                  caption=f"Trained on changes of {self.eps:g}/255."),
        ]  # fmt: skip
        if budgets:
            artifacts.append(
                Curve("which_budget", reach, {f"trained at {b:g}/255": mean[k] for b, k in budgets.items()}, words, "accuracy",
                      caption="Trained on projected gradient steps within the budget.")
            )  # fmt: skip
            lines = {
                "untouched": [mean[k][0] for k in budgets.values()],
                f"attacked at {self.eps:g}/255": [mean[k][at] for k in budgets.values()],
            }
            artifacts.append(Curve("clean_accuracy", list(budgets), lines, "budget of training in 255ths", "accuracy"))
        watched = [(key, t) for key, t in trained.items() if t.course]
        if watched:
            lines = {}
            for key, t in watched:
                word = "plain" if key == "none" else "adversarial"
                lines[f"{word}, untouched"] = [c for c, _ in t.course]
                lines[f"{word}, attacked"] = [a for _, a in t.course]
            artifacts.append(Curve("when_enough", range(1, self.epochs + 1), lines, "epoch", "accuracy",
                                   caption=f"Attacked at {self.eps:g}/255, on the pictures kept apart."))  # fmt: skip
        courses = {self._called(k): t.losses for k, t in trained.items() if np.isfinite(t.losses).all()}
        if courses:
            artifacts.append(Curve("loss", range(1, self.epochs + 1), courses, "epoch", "loss"))
        notes = [
            f"{self._called(k)}: the loss stopped being finite and nothing was learnt; use a smaller learning_rate"
            for k, t in trained.items()
            if not np.isfinite(t.losses).all()
        ]
        rows = []
        for key, hits in curves.items():
            clean, hit = hits[0], hits[at]
            rows.append([self._called(key), float(clean.mean()), *interval(clean), float(hit.mean()), *interval(hit), len(hit)])
        columns = ["trained on", "clean accuracy", "from", "to", f"attacked, {self.eps:g}/255", "from ", "to ", "pictures"]
        artifacts.append(Table("networks", columns, rows))
        metrics: list[Metric] = []
        for noise in ("none", "fgsm", "pgd"):
            if noise in names:
                hits = curves[names[noise]]
                about = {"none": "plain training", "fgsm": "fast adversarial training", "pgd": "adversarial training"}[noise]
                metrics.append(rate(f"clean_{noise}", hits[0], f"accuracy on untouched pictures after {about}"))
                metrics.append(rate(f"attacked_{noise}", hits[at], f"accuracy under attack after {about}", f"eps {self.eps:g}/255"))
        return Result(artifacts, metrics, [*notes, *self._notes(names, curves, at)])

    def _notes(self, names: dict[Noise, str], curves: dict[str, list[np.ndarray]], at: int) -> list[str]:
        notes = []
        for noise, key in names.items():
            clean = curves[key][0]
            if len(clean) and clean.mean() < 0.5 * max(c[0].mean() for c in curves.values()):
                notes.append(
                    f"trained on {WORDS[noise]} the network learns little ({clean.mean():.2f} clean): try a smaller eps or learning_rate"
                )
        return notes

    @staticmethod
    def _called(key: str) -> str:
        noise, _, eps = key.partition(" ")
        return f"{WORDS[noise]}{f', {eps}/255' if eps else ''}"

    def _plan(self, noise: Noise, eps: float) -> tuple[str, dict[str, Any]]:
        """(what it is called, what the recipe says of it)."""
        from harness.registry import Adversary

        if noise == "none":
            return "none", {}
        if noise == "gaussian":  # of the root mean square that random signs have
            return f"gaussian {eps:g}", {"noise": eps / 255}
        if noise == "random":  # no step after a start on the ball's corners
            return f"random {eps:g}", {"signs": eps / 255}
        many = noise == "pgd"
        adversary = Adversary(eps=eps, steps=self.steps if many else 1, step_size=self.step_size if many else 1.25)
        return f"{noise} {eps:g}", {"adversary": adversary}

    def _trained(
        self, ctx: Context, blank: nn.Module, plan: dict[str, Any], split: tuple[Tensor, Tensor, Tensor, Tensor], watch: bool
    ) -> Trained:
        import copy

        from harness.registry import RecipeEntry
        from harness.train import fit

        module = copy.deepcopy(blank)
        recipe = RecipeEntry(
            builder="model:itself",
            dataset=ctx.dataset.name,
            epochs=self.epochs,
            batch_size=self.batch,
            learning_rate=self.learning_rate,
            weight_decay=5e-4,
            schedule="triangular",
            seed=ctx.seed,
            input=ctx.model.input,
            **plan,
        )
        course: list[tuple[float, float]] = []

        def after(_: int) -> None:
            x, y = split[2:]
            course.append((float(self._accuracy(ctx, module, x, y, 0).mean()), float(self._accuracy(ctx, module, x, y, self.eps).mean())))

        losses = fit(module, recipe, *split[:2], after=after if watch else None)
        return Trained(module.eval(), losses, course)

    def _accuracy(self, ctx: Context, module: nn.Module, x: Tensor, y: Tensor, eps: float) -> np.ndarray:
        """(N,) bool: answered rightly under 20 projected gradient steps within eps (255ths)."""
        import copy

        import torch

        from harness.models import LoadedModel

        from .attacks import Attack, attack

        model = LoadedModel(copy.deepcopy(module), ctx.model.input, device=ctx.device)
        settings = Attack("judge", "linf", 20, 0.1, random_start=True)

        def some(rows: slice) -> Tensor:
            draws = ctx.draws([f"judge {i}" for i in range(rows.start, rows.stop)])
            return ~attack(model, x[rows], y[rows], settings, eps / 255, draws, drop=True).fooled

        return torch.cat(list(ctx.batched(len(x), some))).cpu().numpy()


class Trained:
    """A network, its loss of each epoch, and (clean, attacked) accuracy after each where it was watched."""

    def __init__(self, module: nn.Module, losses: list[float], course: list[tuple[float, float]]) -> None:
        self.module, self.losses, self.course = module, losses, course


def fresh(module: nn.Module, seed: int) -> nn.Module:
    """A copy of a network with weights drawn anew, as if it had just been built; NotApplicable where a layer cannot draw its own."""
    import copy

    from harness.context import stable_seed
    from harness.device import placed, seeded

    device = next(module.parameters()).device
    made = copy.deepcopy(module).requires_grad_(True).cpu()  # where weights are drawn, so that all devices see the same
    with seeded(stable_seed("fresh", seed)):
        for name, part in made.named_modules():
            own = list(part.parameters(recurse=False))
            if not own:
                continue
            reset: Any = getattr(part, "reset_parameters", None)
            if reset is None:
                raise NotApplicable(f"needs layers that can draw new weights; {name or 'the network'} ({type(part).__name__}) cannot")
            reset()
    return placed(made, device)
