"""What the IOI replication claims of any model: that it does the task, that the paper's classes of heads are there, and that a
circuit of them is faithful, small, complete and minimal."""

from collections.abc import Sequence

import torch

from microtome.replications.ioi_findings import Findings
from microtome.replications.ioi_steps import Head, name_of
from microtome.views import Claim, at_least, at_most

PAPER = "Wang et al. 2022 (arXiv 2211.00593)"


def own_claims(found: Findings) -> list[Claim]:
    """All of them."""
    return [*_task_claims(found), *_class_claims(found), *_circuit_claims(found)]


def _task_claims(found: Findings) -> list[Claim]:
    sums = {variant: one.summary() for variant, one in found.baselines.items()}
    plain, n = sums["plain"], found.config.prompts
    lost = 1 - sums["extra_io"]["difference"][0] / plain["difference"][0]
    return [
        Claim(
            "solves",
            f"The indirect object's logit is above the subject's (share of {n:,} prompts)",
            at_least(0.8),
            plain["right"][0],
            interval=plain["right"][1:],
            source=f"{PAPER}: 99.3 % in GPT-2 small",
        ),
        Claim(
            "difference",
            "Mean logit difference, IO − S",
            at_least(1.0),
            plain["difference"][0],
            interval=plain["difference"][1:],
            source=f"{PAPER}: 3.56 in GPT-2 small",
        ),
        Claim(
            "adversarial",
            "Where the indirect object is said twice, the logit difference falls (share of it lost)",
            at_least(0.1),
            lost,
            source=f"{PAPER}, section 4: from 3.55 to 1.23 in GPT-2 small, a loss of 65 %",
        ),
    ]


def _class_claims(found: Findings) -> list[Claim]:
    return [*_mover_claims(found), *_backup_claims(found), *_path_claims(found)]


def _mover_claims(found: Findings) -> list[Claim]:
    """The heads that write to the logits: which, and whether they copy what they look at."""
    passes, rules = found.passes, found.config
    movers = passes.of("name mover")
    negative = [f.head for f in passes.finds if f.kind == "negative mover" and f.effect >= rules.direct]
    raised = found.copies[0]
    claims = [
        Claim(
            "movers",
            f"Heads whose direct path carries ≥ {rules.direct:.0%} of the difference, look at the IO and copy (name movers)",
            at_least(1),
            len(_strong(found, "name mover")),
            source=PAPER,
            note=named(movers),
        ),
        Claim(
            "negative",
            f"Heads whose direct path takes away ≥ {rules.direct:.0%} (negative movers)",
            at_least(1),
            len(negative),
            source=PAPER,
            note=named(negative),
        ),
    ]
    if movers:
        copy, average = float(torch.stack([raised[head] for head in movers]).mean()), float(raised.mean())
        best = max(found.writings[head].correlation for head in movers)
        claims += [
            Claim(
                "copying",
                "Name movers copy: a name is among the five tokens that their OV circuit raises most (mean share)",
                at_least(0.9),
                copy,
                source=f"{PAPER}: above 95 %, average head below 20 %",
                note=f"average head {average:.3f}",
            ),
            Claim(
                "writes",
                "Attention to a name goes with what is written of it (largest correlation of a mover)",
                at_least(0.8),
                best,
                source=f"{PAPER}: above 0.81",
            ),
        ]
    return claims


def _backup_claims(found: Findings) -> list[Claim]:
    """What is lost without the movers."""
    lost = found.study.full - float(found.backup.without.mean())
    direct = (
        -sum(f.effect for f in found.passes.finds if f.through == "logits" and f.head in found.movers)
        * found.study.full
    )
    return [
        Claim(
            "backup",
            "Without the movers less is lost than they write directly (share of it)",
            at_most(1.0),
            lost / direct,
            source=f"{PAPER}: −5 % for GPT-2 small's three",
            note=f"{lost / found.study.full:.3f} of F(M) is lost",
        )
    ]


def _path_claims(found: Findings) -> list[Claim]:
    """The heads before the movers, confirmed on random tokens where their class says what they do there."""
    claims = []
    for kind, score in (
        ("S-inhibition", None),
        ("induction", "induction"),
        ("duplicate token", "duplicate_token"),
        ("previous token", "previous_token"),
    ):
        heads = _strong(found, kind)
        key = kind.replace(" ", "_").replace("-", "_").lower()
        claims.append(
            Claim(f"{key}_heads", f"{kind} heads on the path", at_least(1), len(heads), source=PAPER, note=named(heads))
        )
        if heads and score is not None:
            best = max(float(found.scores[score][head]) for head in heads)
            claims.append(
                Claim(
                    f"{key}_score",
                    f"The best of them has this {score.replace('_', ' ')} score on random tokens",
                    at_least(0.25),
                    best,
                    source=PAPER,
                )
            )
    return claims


def _strong(found: Findings, kind: str) -> list[Head]:
    """The heads of a class without those that only stand in, being too weak."""
    limits = {"logits": found.config.direct, "knock-out": found.config.direct}
    return [
        f.head
        for f in found.passes.finds
        if f.kind == kind and abs(f.effect) >= limits.get(f.through, found.config.further)
    ]


def _circuit_claims(found: Findings) -> list[Claim]:
    whole, full, n = found.faithfulness["the circuit"], found.study.full, n_heads(found)
    sets = [one.gap / abs(full) for one in found.completeness if not one.name.startswith("greedy")]
    worst = max((one.gap / abs(full) for one in found.completeness), default=0.0)
    useless = [one.head for one in found.minimality if one.share < 0.01]
    return [
        Claim(
            "faithful",
            "F(C)/F(M) on held-out prompts",
            at_least(found.config.faithful),
            whole.ratio,
            interval=(whole.low, whole.high),
            source=f"{PAPER}: 0.87 in GPT-2 small",
        ),
        Claim(
            "small",
            "Share of all heads in the circuit",
            at_most(found.config.max_share),
            whole.n_heads / n,
            source=f"{PAPER}: 26 of 144",
            note=f"{whole.n_heads} of {n}",
        ),
        Claim(
            "complete",
            "Completeness: mean gap over class and random sets / F(M)",
            at_most(0.25),
            sum(sets) / max(1, len(sets)),
            source=f"{PAPER}: small for these, up to 0.87 for a greedy set",
            note=f"largest of all sets {worst:.3f}",
        ),
        Claim(
            "minimal",
            "Minimality: heads that matter less than 1 % of F(M)",
            at_most(2),
            len(useless),
            source=PAPER,
            note=named(useless),
        ),
    ]


def n_heads(found: Findings) -> int:
    """How many heads the model has."""
    return found.model.config.n_layers * found.model.config.n_heads


def named(heads: Sequence[Head]) -> str:
    """Heads in words."""
    return ", ".join(map(name_of, heads)) or "none"
