from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from harness import ConfigError, Curve, Images, Paper, Param, Result, Table, Technique
from harness.technique import Further

from .attacks import Attack, Norm, attack, in_255ths, perturbed, project, success
from .shared import AMPLIFIED, check_alike, fitted, in_full_precision, interval, rate, resampled, second, tell_difference

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context

Named = Literal["fgsm", "pgd", "pgd_targeted", "fgm_l2", "pgd_l2"]
NOISES = 20  # random changes tried a picture, by which the gradient attacks must not be outdone
SURPRISE = 0.02  # share of pictures by which a weaker attack may outdo a stronger one before it is a warning
WORST = "worst case"
SHOWN = 4  # fooled pictures of each norm


class AttackCurve(Technique):
    """Accuracy under attack as the budget grows, for several attacks and for the worst case over them: FGSM (Goodfellow et al. 2014,
    arXiv:1412.6572), projected gradient descent in L-inf and L2 (Madry et al. 2017, arXiv:1706.06083), and the same towards the
    second most likely class.

    A picture fooled within one budget is fooled within every larger one, so rates never fall with eps, and a picture once fooled
    costs nothing more. Whether the gradients can be trusted is checked: more steps, random changes and a second model's
    pictures must not do better than the attacks. Cost: `steps` forward and backward passes a picture, budget and attack, at most.
    """

    name = "attack_curve"
    family = "adversarial"
    paper = Paper("Madry, Makelov, Schmidt, Tsipras, Vladu", 2017, "Towards Deep Learning Models Resistant to Adversarial Attacks",
                  arxiv="1706.06083")  # fmt: skip
    needs = frozenset({"images", "classifier"})
    reading = (
        "Each line starts at the accuracy on untouched pictures and falls as the budget grows; the worst case counts a picture as lost "
        "once any attack fools the model. What remains at a budget was not broken by these attacks: it is no proof."
    )
    caveats = (
        "An upper bound on robustness: better attacks find more. Mind the warnings, the number of pictures and the interval; a single "
        "weak attack, FGSM above all, says nothing about robustness."
    )
    audit = {"standard": {"eps": (0.1, 0.25, 0.5, 1, 2, 4), "attacks": ("fgsm", "pgd"), "steps": 10}, "full": {}}

    attacks: tuple[Named, ...] = Param(
        ("fgsm", "pgd", "pgd_targeted", "fgm_l2", "pgd_l2"), min_length=1, description="attacks that are tried; the worst case is over all"
    )
    eps: tuple[float, ...] = Param((0.1, 0.25, 0.5, 1, 2, 4, 8, 16), min_length=1, description="budgets in L-inf, in 255ths")
    eps_l2: tuple[float, ...] = Param((0.05, 0.1, 0.25, 0.5, 1, 2, 4), min_length=1, description="budgets in L2, of pictures in [0, 1]")
    steps: int = Param(20, ge=1, le=100_000, description="steps of the iterated attacks")
    step_size: float = Param(0.1, gt=0, le=2, description="their length as a share of the budget")
    random_start: bool = Param(True, description="begin at a random place of the ball; the single-step attacks begin at the picture")
    checks: bool = Param(True, description="look for signs of masked gradients: more steps, random changes, a second model's pictures")
    surrogate: str = Param("", description="a second model with the same classes, whose adversarial pictures are tried as well")

    def further(self) -> Further:
        return Further(models=[self.surrogate] if self.surrogate else [])

    @in_full_precision
    def run(self, ctx: Context) -> Result:
        wrong = [e for e in self.eps if not 0 <= e <= 255]
        if wrong:
            raise ConfigError(f"attack_curve.eps: {wrong[0]:g} is outside 0 to 255; budgets are in 255ths of the range of a pixel")
        if min(self.eps_l2) < 0:
            raise ConfigError(f"attack_curve.eps_l2: {min(self.eps_l2):g} is below zero; budgets are lengths")
        notes = []
        if self.surrogate:
            check_alike(ctx.model, ctx.further_model(self.surrogate), "attack_curve.surrogate")
            if not (self.checks and any(plan.steps > 1 and not plan.targeted for plan in self._plans())):
                notes.append(f"pictures of {self.surrogate} were not tried: that wants `checks` and an iterated attack (pgd, pgd_l2)")
        labels = ctx.predicted if ctx.labels is None else ctx.labels
        right = (ctx.own_logits.argmax(1) == labels).cpu().numpy()
        if ctx.labels is None:
            notes.append("the pictures have no labels of this model: what counts is whether the answer changes")
        if not right.any():
            notes.append("the model is wrong on every picture as it is: there is nothing to attack")
        artifacts: list[Any] = []
        metrics = [rate("clean_accuracy", right, "share of untouched pictures that the model gets right")]
        rows: list[list[Any]] = []
        norms: tuple[tuple[Norm, tuple[float, ...]], ...] = (
            ("linf", tuple(sorted(e / 255 for e in set(self.eps)))),
            ("l2", tuple(sorted(set(self.eps_l2)))),
        )
        for norm, budgets in norms:
            plans = [a for a in self._plans() if a.norm == norm]
            if not plans:
                continue
            lost, pictures = self._curve(ctx, labels, right, plans, budgets)
            lines = {name: [right.mean(), *(1 - (lost[name] | ~right[None]).mean(1))] for name in lost}
            scale = 255 if norm == "linf" else 1
            words = "eps in 255ths (L-inf)" if norm == "linf" else "eps (L2 norm, pixels in [0, 1])"
            artifacts.append(Curve(f"accuracy_{norm}", [0, *(scale * b for b in budgets)], lines, words, "accuracy"))
            for name, found in lost.items():
                for budget, hits in zip(budgets, found, strict=True):
                    after = right & ~hits
                    low, high = interval(after)
                    label = in_255ths(budget) if norm == "linf" else f"{budget:g}"
                    share = float(hits[right].mean()) if right.any() else None
                    rows.append([name, "L-inf" if norm == "linf" else "L2", label, float(after.mean()), low, high, share, len(after)])
            about = f"accuracy under the worst of the attacks within the largest budget in {'L-inf' if norm == 'linf' else 'L2'}"
            last = right & ~lost[WORST][-1]
            label = in_255ths(budgets[-1]) if norm == "linf" else f"{budgets[-1]:g}"
            metrics.append(rate(f"attacked_accuracy_{norm}", last, about, f"eps {label}"))
            artifacts += self._shown(ctx, pictures, labels, norm)
            if self.checks and right.any():
                notes += self._warnings(ctx, labels, right, norm, budgets[len(budgets) // 2], lost, len(budgets) // 2)
        if set(self.attacks) <= {"fgsm", "fgm_l2"}:
            notes.append("only single-step attacks were tried: this says nothing about robustness; add pgd")
        columns = ["attack", "norm", "eps", "accuracy", "from", "to", "fooled of the right ones", "pictures"]
        artifacts.append(Table("rates", columns, rows))
        return Result(artifacts, metrics, notes)

    def _plans(self) -> list[Attack]:
        known = {
            "fgsm": Attack("fgsm", "linf", 1, 1.0),
            "pgd": Attack("pgd", "linf", self.steps, self.step_size, random_start=self.random_start),
            "pgd_targeted": Attack("pgd_targeted", "linf", self.steps, self.step_size, targeted=True, random_start=self.random_start),
            "fgm_l2": Attack("fgm_l2", "l2", 1, 1.0),
            "pgd_l2": Attack("pgd_l2", "l2", self.steps, self.step_size, random_start=self.random_start),
        }
        return [known[name] for name in dict.fromkeys(self.attacks)]

    def _curve(
        self, ctx: Context, labels: Tensor, right: np.ndarray, plans: list[Attack], budgets: tuple[float, ...]
    ) -> tuple[dict[str, np.ndarray], dict[int, Tensor]]:
        """{attack: (budgets, N) bool, fooled within it}, the worst case last, and the first picture found for each that was fooled."""
        lost: dict[str, np.ndarray] = {}
        pictures: dict[int, Tensor] = {}
        total, done = len(plans) * len(budgets), 0
        for plan in plans:
            found = np.zeros((len(budgets), len(right)), dtype=bool)
            for k, eps in enumerate(budgets):
                if k:
                    found[k] = found[k - 1]
                todo = np.flatnonzero(right & ~found[k])
                for i, picture, hit in self._tried(ctx, labels, todo, plan, eps):
                    found[k, i] = hit
                    if hit and i not in pictures:
                        pictures[i] = picture.clone()  # not a view, which would hold the whole batch
                        if len(pictures) > SHOWN:
                            del pictures[max(pictures)]
                done += 1
                ctx.report("budgets", done, total)
            lost[plan.name] = found
        lost[WORST] = np.logical_or.reduce(list(lost.values()))
        return lost, pictures

    def _tried(self, ctx: Context, labels: Tensor, todo: np.ndarray, plan: Attack, eps: float) -> list[tuple[int, Tensor, bool]]:
        """(picture, what the attack made of it, whether it is fooled) of the pictures `todo`."""
        import torch

        if not len(todo):
            return []
        places = torch.from_numpy(todo).to(ctx.device)
        images, own = ctx.images[places], labels[places]
        classes = second(ctx.own_logits[places], own) if plan.targeted else own
        ids = [ctx.ids[i] for i in todo]

        def some(rows: slice) -> tuple[Tensor, Tensor]:
            draws = ctx.draws(ids[rows], stream=f"{plan.name} {eps:.6g}")
            made = attack(ctx.model, images[rows], classes[rows], plan, eps, draws, drop=True)
            # Towards a class or not: what counts is that the answer is no longer the label.
            return made.images, made.fooled | success(ctx.model, made.images, own[rows], False) if plan.targeted else made.fooled

        parts = list(ctx.batched(len(todo), some))
        pictures, hits = torch.cat([p for p, _ in parts]), torch.cat([h for _, h in parts]).tolist()
        return [(int(i), pictures[k], hits[k]) for k, i in enumerate(todo)]

    def _shown(self, ctx: Context, pictures: dict[int, Tensor], labels: Tensor, norm: str) -> list[Images]:
        """Some fooled pictures: original, changed, ten times the difference."""
        import torch

        some = sorted(pictures)
        if not some:
            return []
        made = torch.stack([pictures[i] for i in some])
        old = ctx.images[some]
        now = ctx.logits(made).argmax(1).tolist()
        sheet = torch.stack([old, made, (0.5 + AMPLIFIED * (made - old)).clamp(0, 1)], 1).flatten(0, 1)
        captions = []
        for k, i in enumerate(some):
            label, name = (ctx.model.class_name(int(c)) for c in (labels[i], now[k]))
            captions += [label, name, tell_difference(made[k] - old[k], AMPLIFIED)]
        return [Images(f"fooled_{norm}", sheet, captions=captions, columns=3, exact=made.shape[-1] < 64)]

    def _warnings(
        self, ctx: Context, labels: Tensor, right: np.ndarray, norm: Norm, eps: float, lost: dict[str, np.ndarray], place: int
    ) -> list[str]:
        """Signs that gradients lead the attacks astray (Athalye et al. 2018, arXiv:1802.00420, sec. 3.1)."""
        import torch

        found: list[str] = []
        where = f"at eps {in_255ths(eps) if norm == 'linf' else f'{eps:g} (L2)'}"
        worst = lost[WORST][place]
        count = int(right.sum())
        iterated = [a for a in self._plans() if a.norm == norm and a.steps > 1 and not a.targeted]
        single = "fgsm" if norm == "linf" else "fgm_l2"
        for plan in iterated:
            if single in lost:
                more = int((lost[single][place] & ~lost[plan.name][place]).sum())
                if more > SURPRISE * count:
                    found.append(f"warning, {where}: one step fools {more} pictures that {plan.name} does not; gradients may be masked")
            longer = Attack(plan.name, norm, 5 * plan.steps, plan.step, random_start=plan.random_start)
            todo = np.flatnonzero(right & ~lost[plan.name][place])
            more = sum(hit for _, _, hit in self._tried(ctx, labels, todo, longer, eps))
            if more > SURPRISE * count:
                found.append(f"warning, {where}: five times the steps fool {more} more pictures than {plan.name}; it has not converged")
        todo = np.flatnonzero(right & ~worst)
        if not len(todo):
            return found
        places = torch.from_numpy(todo).to(ctx.device)
        images, own = ctx.images[places], labels[places]
        draws = ctx.draws([ctx.ids[i] for i in todo], stream=f"noise {norm}")
        hit = torch.zeros(len(todo), dtype=torch.bool, device=ctx.device)
        for _ in range(NOISES):
            noise = draws.randn(images.shape[1:])
            moved = project(images + (eps * noise.sign() if norm == "linf" else 1e3 * eps * noise), images, eps, norm)
            hit |= ctx.logits(moved).argmax(1) != own
        if int(hit.sum()) > SURPRISE * count:
            found.append(f"warning, {where}: random changes fool {int(hit.sum())} pictures that no attack does; gradients may be masked")
        if self.surrogate and iterated:
            other = ctx.further_model(self.surrogate)
            size = images.shape[-1]

            def theirs(rows: slice) -> Tensor:
                pictures = fitted(images[rows], other.input.size)
                made = perturbed(other, pictures, own[rows], iterated[0], eps, ctx.draws([ctx.ids[i] for i in todo[rows]]))
                # Changes of pictures of another size are brought to this one's, within the same budget.
                if made.shape[-1] == size:
                    return made
                return project(images[rows] + resampled(made - pictures, size), images[rows], eps, norm)

            made = torch.cat(list(ctx.batched(len(todo), theirs)))
            more = int((ctx.logits(made).argmax(1) != own).sum())
            if more > SURPRISE * count:
                found.append(
                    f"warning, {where}: pictures made on {self.surrogate} fool {more} that no attack here does; gradients may be masked"
                )
        return found
