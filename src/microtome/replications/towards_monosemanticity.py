"""Towards monosemanticity: a one-layer transformer's MLP taken apart into more features than it has neurons.

Bricken et al. 2023. The model and the dictionary are trained here (`monosemanticity_training.py`); features and neurons are then
measured by the same functions (`monosemanticity_measures.py`, `monosemanticity_tables.py`).
"""

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from microtome.common.artifacts import atomic_file
from microtome.common.progress import Progress
from microtome.dictionary import Dictionary
from microtome.model import HookedModel
from microtome.replications.frame import Replication
from microtome.replications.monosemanticity_blind import comparison
from microtome.replications.monosemanticity_measures import (
    Kind,
    collect,
    goes_below_zero,
    losses,
    neurons_as_dictionary,
)
from microtome.replications.monosemanticity_report import (
    Study,
    dictionary_section,
    feature_section,
    model_section,
    specificity_section,
)
from microtome.replications.monosemanticity_tables import features_page, specificity, strings_of
from microtome.replications.monosemanticity_training import MonosemanticityConfig, Subject, trained
from microtome.views import Report


def run(config: MonosemanticityConfig, model: HookedModel | None, progress: Progress) -> Report:
    """Train model and dictionary (or find them), and measure."""
    with ExitStack() as stack:
        folder = Path(config.runs or stack.enter_context(TemporaryDirectory()))
        study = studied(config, trained(config, folder, progress, model), progress)
        if config.sheets is not None:
            write_sheets(study, Path(config.sheets))
    steps = [model_section(study), dictionary_section(study), specificity_section(study), feature_section(study)]
    features = study.features
    about = {
        "hook_name": study.subject.hook_name,
        "trained here": model is None,
        "parameters": sum(p.numel() for p in study.subject.model.hf.parameters()),
        "dictionary": {"d_sae": features.dictionary.d_sae, "fingerprint": features.dictionary.fingerprint},
    }
    return Report(
        title="Towards monosemanticity",
        summary=(
            f"{features.dictionary.d_in} neurons of the last MLP as {features.dictionary.d_sae:,} features: "
            f"{features.firings.l0:.1f} fire on a token, and with the reconstruction in their "
            f"place the loss is {features.losses.spliced - features.losses.clean:.3f} nats higher, which is "
            f"{features.losses.recovered_zero:.1%} recovered of what it costs to set the neurons to zero."
        ),
        claims=[claim for step in steps for claim in step.claims],
        sections=[step.section for step in steps],
        provenance=about,
    )


def studied(config: MonosemanticityConfig, subject: Subject, progress: Progress) -> Study:
    """Features and neurons, each measured in the same way."""
    model, held_out = subject.model, subject.held_out

    def measured(name: str, dictionary: Dictionary) -> Kind:
        firings = collect(model, dictionary, held_out, config.table_tokens)
        lost = losses(model, dictionary, held_out, config.loss_tokens)
        progress.advance(1, f"{name}s")
        return Kind(name, dictionary, firings, lost)

    features = measured("feature", subject.dictionary)
    signed = goes_below_zero(model, subject.hook_name, held_out)
    neurons = measured("neuron", neurons_as_dictionary(model, subject.hook_name, signed=signed))
    return Study(config, subject, features, neurons, (specificity(features.firings), specificity(neurons.firings)))


def write_sheets(study: Study, folder: Path) -> None:
    """`features.md`, and the blind comparison with its empty ratings and its key."""
    config, subject = study.config, study.subject
    kinds = {kind.name: kind.firings for kind in (study.features, study.neurons)}
    comparison(kinds, strings_of(subject.model), n=config.compared, seed=config.seed).save(folder)
    page = features_page(
        subject.model,
        subject.dictionary,
        study.features.firings,
        study.drawn(config.shown),
        title=f"{config.shown} features, drawn at random",
        seed=config.seed,
    )
    with atomic_file(folder / "features.md") as file:
        file.write_text(page, encoding="utf-8")


REPLICATION = Replication(
    name="towards_monosemanticity",
    title="Towards monosemanticity: a dictionary of a one-layer transformer's MLP",
    source=(
        "Bricken et al. 2023, “Towards Monosemanticity: Decomposing Language Models With Dictionary Learning”, "
        "transformer-circuits.pub/2023/monosemantic-features"
    ),
    about="a one-layer transformer trained on text, and its MLP's neurons against the features of a sparse dictionary",
    smoke=MonosemanticityConfig(
        corpus="demo",
        max_tokens=200_000,
        d_vocab=512,
        context=64,
        d_model=32,
        n_heads=2,
        d_mlp=64,
        lm_tokens=600_000,
        lm_lr=1e-2,
        d_sae=256,
        coefficient=2.0,
        sae_tokens=120_000,
        sae_batch=512,
        sae_lr=3e-3,
        resample_every=40,
        dead_after=10_000,
        loss_tokens=2048,
        table_tokens=8192,
        compared=4,
        recovered=0.6,
        specific=0.5,
        shown=4,
        device="cpu",
    ),
    full=MonosemanticityConfig(),
    run=run,
    steps=lambda config: 4,
    default_model=None,
)
