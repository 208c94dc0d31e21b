"""Evaluate a trained run, or several as an ensemble: scores by class, calibration, robustness.

    cnnjax evaluate --run runs/mnist_lenet-20250101-120000
    cnnjax evaluate --run runs/a runs/b runs/c --tta shift:1 --calibrate
    cnnjax evaluate --run runs/a --attack fgsm:0.3 pgd:0.3:20:5 --check-masking
    cnnjax evaluate --run runs/a --full --reference runs/lenet5

    cnnjax evaluate --weights FILE --model NAME --dataset tfds:imagenet2012

A file of published weights (or a run that `cnnjax convert` made of one) is evaluated on ImageNet or
a variant of it as published: images are scaled and cut as the weights' own transform does it, and
top 1, top 5 and the loss are told. See docs/weights.md.

A run of another task than classification is scored and reported as at its own end.

--full is one table of everything: accuracy, the 19 corruptions of ImageNet-C at five severities,
FGSM and calibration. See docs/robust.md.

Attacks are written NAME:EPSILON:STEPS:RESTARTS, or in full such as `pgd(0.3, num_steps=20)`. Each
is first tried on a linear model, on which the best attack is known: one that falls short there is
refused.
"""

import dataclasses
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

import cnnjax
from cnnjax import spec
from cnnjax.errors import UserError
from cnnjax.run import files, load
from cnnjax.run.help import listed

# Flags that change a classifier's logits, images or data.
OF_CLASSIFIERS = (
    *("dataset", "data_dir", "base", "average", "tta", "corrupt", "preprocess"),
    *("calibrate", "attack", "attack_examples", "check_masking", "full", "reference", "seed"),
)
# Small enough for the gradients of small networks to stay in a CPU's cache.
ATTACK_BATCH_SIZE = 128


@dataclasses.dataclass(frozen=True)
class Config:
    """Print accuracy, precision, recall, F1, ROC AUC and calibration of a run; draw its figures."""

    listings: ClassVar[dict[str, str]] = listed("tta", "preprocess", "attack")

    run: tuple[str, ...] = ()
    """The run directory; several are an ensemble. RUN@STEP is the checkpoint of that step."""

    weights: str = ""
    """A file of weights for ImageNet's 1000 classes, or a run converted from one, instead of
    --run."""

    model: str = ""
    """Of --weights FILE: the network, as --model of cnnjax convert."""

    framework: str = "auto"
    """Of --weights FILE: whose names it has, as --framework of cnnjax convert."""

    split: Literal["test", "validation", "train"] = "test"
    """What to evaluate on."""

    dataset: str = ""
    """Another dataset with the same classes, or where the run's own is now, such as folder:NEW; by
    default the run's own."""

    data_dir: str = ""
    """Where tfds datasets are; by default the run's own."""

    base: str = ""
    """Where the base of fine-tuned runs is now; by default where it was."""

    average: Literal["probabilities", "logits"] = "probabilities"
    """What an ensemble averages."""

    tta: str = ""
    """Test-time augmentation: average over views of each image, such as shift:1,flip."""

    corrupt: str = ""
    """Random changes of the images first, as of --augment, such as salt_and_pepper:0.1."""

    preprocess: str = ""
    """A filter of the (corrupted) images, such as median:3, besides the run's own."""

    calibrate: bool = False
    """Fit a temperature to the validation images, and report calibration with it."""

    attack: tuple[str, ...] = ()
    """Attacks to report the accuracy under, such as fgsm:0.3 pgd:0.3:20:5."""

    attack_examples: int = 0
    """Attack only the first N images; 0 attacks all."""

    check_masking: bool = False
    """Look for signs that gradients mislead the attacks: see robust.signs_of_masking."""

    full: bool = False
    """Also the error under 19 corruptions at five severities, accuracy under FGSM, and calibration
    with a temperature, in one table."""

    reference: str = ""
    """Of --full: a run whose errors under corruptions are divided by, such as a LeNet-5; by
    default AlexNet's published ones where the classes are ImageNet's 1000."""

    seed: int = 0
    """Of --full and --corrupt: what is drawn."""

    smoke: bool = False
    """Evaluate as many images as a smoke run has. Scores mean little."""

    out: str = ""
    """Where to write evaluation.json and the figures; by default RUN/evaluation-SPLIT, of several
    runs the first one's RUN/ensemble-SPLIT; with the steps of RUN@STEP in the name."""


def main(config: Config) -> None:
    """Evaluates one run, or several as one."""
    attacks = [cnnjax.robust.parse_attack(text) for text in config.attack]
    views = cnnjax.evaluation.ensemble.parse_views(config.tta) if config.tta else []
    spec.check(config.corrupt, cnnjax.augment.policy.NAMES, cnnjax.augment.policy.KIND)
    spec.check(config.preprocess, cnnjax.augment.filters.FILTERS, "filter")
    if config.attack_examples < 0:
        raise UserError(f"--attack-examples {config.attack_examples}: give 0 (all) or more.")
    if config.check_masking and not attacks:
        raise UserError("--check-masking needs an attack to check: add --attack pgd:0.3:20.")
    if config.reference and not config.full:
        raise UserError("--reference is for --full: add it, or leave the reference out.")
    if config.full and config.corrupt:
        raise UserError("--full corrupts the images itself: leave --corrupt out.")
    cnnjax.devices.backend.start(devices=1)
    if config.weights:
        return _evaluate_weights(config)
    if len(config.run) == 1 and load.task_of(_at_step(config.run[0])[0]) != "classification":
        return _evaluate_task(config)
    _evaluate_classifiers(config, attacks, views)


def _evaluate_classifiers(config, attacks, views):
    """Scores one classifier, or several as one."""
    directories = [_at_step(run)[0] for run in config.run]
    base_of = load.base_if_tuned if len(directories) > 1 else lambda run, base: base or None
    members = [
        load.load_classifier(*_at_step(run), base=base_of(directory, config.base))
        for run, directory in zip(config.run, directories, strict=True)
    ]
    evaluated = cnnjax.studies.evaluated
    dataset = evaluated.open_data(config, directories, [member.card for member in members])
    reference = _reference(config, members[0].card) if config.full else None
    out = _out(config, directories)
    files.make_directory(out, "the directory of scores", "--out")
    for attack in attacks:
        cnnjax.robust.check_attack(attack, dataset.image_shape)
    ensemble = cnnjax.evaluation.ensemble
    logits_of = [ensemble.model_logits(member.model, member.normalize) for member in members]
    image_filter = cnnjax.augment.make_filter(config.preprocess)
    if image_filter is not None:
        logits_of = [_of_filtered(each, image_filter) for each in logits_of]
    if views:
        logits_of = [ensemble.with_views(each, views) for each in logits_of]
    variables = [member.variables for member in members]

    each, labels = evaluated.predict(logits_of, variables, dataset, config.split)
    logits = np.asarray(ensemble.mean_logits(each, config.average))
    probabilities = cnnjax.evaluation.calibration.apply_temperature(logits, 1.0)
    shown = cnnjax.data.example_inputs(dataset, config.split)
    found = cnnjax.tasks.classification.report(
        probabilities, {"label": labels, **shown}, class_names=dataset.class_names
    )
    if len(members) == 1:
        from cnnjax.explain.worst import with_worst_explained

        found = with_worst_explained(
            found,
            members[0].model,
            variables[0],
            evaluated.filtered(members[0].normalize, image_filter),
            probabilities,
            {"label": labels, **shown},
        )
    report = found.scores
    print(
        f"{_describe(config.run, members)}, on {len(labels):,} {config.split} images of "
        f"{dataset.name}"
    )
    print(found.text)
    if len(members) > 1:
        report["ensemble"] = _compare(config.run, each, labels)
    held = None
    if config.calibrate or (config.full and cnnjax.data.split_size(dataset, "validation")):
        each, held_labels = evaluated.predict(logits_of, variables, dataset, "validation")
        held = np.asarray(ensemble.mean_logits(each, config.average)), held_labels
    if config.calibrate and held:
        report["calibration"] = _calibrate(*held, logits, labels)
    combined = ensemble.ensemble_logits(logits_of, average=config.average)
    if attacks:
        report["robustness"] = _attack(config, attacks, combined, variables, dataset)

    figures = found.figures
    if config.full:
        full_scores = cnnjax.studies.full_scores
        rows = full_scores.batch_size(dataset.image_shape)
        full = full_scores.full(
            full_scores.Subject(combined, variables),
            lambda: cnnjax.data.split_batches(dataset, config.split, rows),
            logits,
            labels,
            held=held,
            reference=reference,
            seed=config.seed,
        )
        title = f"{_describe(config.run, members)}, {config.split} images of {dataset.name}"
        report["full"], drawn = full_scores.tell(full, out, title, config.reference)
        figures = {**figures, **drawn}
    _write(out, report, figures)


def _reference(config, card):
    """Returns what errors under corruptions are divided by; checks what --full needs."""
    from cnnjax.data.packaged import imagenet
    from cnnjax.evaluation import corruption_error, ensemble

    shape, names = card["image_shape"], card["class_names"]
    if shape[-1] not in (1, 3):
        raise UserError(f"--full corrupts images of 1 or 3 channels, not of {shape[-1]}.")
    if not config.reference:
        of_imagenet = len(names) == 1000 and set(names) == set(imagenet.wordnet_numbers())
        return corruption_error.published_reference() if of_imagenet else None
    directory, step = _at_step(config.reference)
    base = load.base_if_tuned(directory, config.base)
    trained = load.load_classifier(directory, step, base=base)
    for what, key in (("classes", "class_names"), ("images", "image_shape")):
        if list(trained.card[key]) != list(card[key]):
            raise UserError(
                f"--reference {config.reference} has other {what}: choose a run of the same data."
            )
    return cnnjax.studies.full_scores.Subject(
        ensemble.model_logits(trained.model, trained.normalize), trained.variables
    )


def _out(config, directories):
    """Returns where to write; of a run at another step than its own choice not over its scores."""
    kind = "evaluation" if len(directories) == 1 else "ensemble"
    steps = [step for _, step in map(_at_step, config.run) if step is not None]
    name = "-".join([kind, config.split, *(f"step-{step}" for step in steps)])
    return Path(config.out or Path(directories[0]) / name)


def _evaluate_task(config):
    """Scores and reports a run of another task than classification, as its own end does."""
    from cnnjax.run import again

    directory, step = _at_step(config.run[0])
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    for name in OF_CLASSIFIERS:
        if getattr(config, name) != defaults[name]:
            raise UserError(
                f"--{name.replace('_', '-')} is for classifiers, and {directory} is a run of the "
                f"task {load.task_of(directory)}: leave it out."
            )
    recipe = again.recipe_of_run(directory)
    if config.smoke:
        recipe = dataclasses.replace(recipe, dataset=cnnjax.run.trainer.shrink(recipe.dataset))
    variables, step = load.load_variables(directory, step)
    out = _out(config, [directory])
    files.make_directory(out, "the directory of scores", "--out")
    mesh = cnnjax.devices.sharding.make_mesh(1)
    scoring = cnnjax.run.scoring.make_scoring(recipe, mesh, lambda state: state.variables())
    scores, found = scoring.of(variables, config.split), scoring.report(variables, config.split)()
    count = cnnjax.data.split_size(recipe.dataset, config.split)
    numbers = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
    print(f"{directory}, step {step}, on {count:,} {config.split} examples: {numbers}")
    print(found.text)
    _write(out, {**scores, **found.scores}, found.figures)


def _evaluate_weights(config):
    """Scores published weights on a test set of ImageNet or a variant, with their own transform."""
    from cnnjax.data.packaged import imagenet

    allowed = {"weights", "model", "framework", "dataset", "data_dir", "split", "out", "base"}
    allowed |= {"full", "seed"}
    for field in dataclasses.fields(config):
        if field.name not in allowed and getattr(config, field.name) != field.default:
            raise UserError(f"--{field.name.replace('_', '-')} is for --run, not for --weights.")
    if not config.dataset:
        raise UserError("no images given: name them, such as --dataset tfds:imagenet2012.")
    data_dir = config.data_dir or None
    # Reading the weights takes longest.
    imagenet.check_images(config.dataset, split=config.split, data_dir=data_dir)
    if config.out:
        files.make_directory(Path(config.out), "the directory of scores", "--out")
    trained = _published(config)
    shape, fit = trained.card["image_shape"], trained.card.get("fit", "pad")
    images = imagenet.open_images(
        config.dataset, tuple(shape[:2]), fit=fit, split=config.split, data_dir=data_dir
    )
    print(f"{trained.card['model']}, {images.count:,} images of {images.name}, {fit} to {shape[0]}")
    found = cnnjax.evaluation.imagenet.evaluate(
        trained.model, trained.variables, images, normalize=trained.normalize
    )
    among = "" if found["classes"] == 1000 else f", among {found['classes']} classes"
    print(f"top 1 {found['top1']:.2%}  top 5 {found['top5']:.2%}  loss {found['loss']:.4f}{among}")
    figures = {}
    if config.full:
        full_scores, out = cnnjax.studies.full_scores, Path(config.out) if config.out else None
        full = full_scores.of_published(trained, images, seed=config.seed)
        title = f"{trained.card['model']}, {images.name}"
        found["full"], figures = full_scores.tell(full, out, title)
    if config.out:
        _write(Path(config.out), {"dataset": images.name, "fit": fit, **found}, figures)


def _published(config):
    """Returns the model of --weights, a file or a run."""
    from cnnjax.commands import convert

    path = Path(config.weights)
    if (path / "model.json").is_file():
        return load.load_classifier(path, base=config.base or None)
    if not path.exists():
        raise UserError(f"there is no {path}: give a file of weights, or a converted run.")
    _, _, card, model, variables = convert.read_weights(
        convert.Config(source=path, out=path, model=config.model, framework=config.framework)
    )
    return load.TrainedModel(model, variables, card, 0)


def _write(out, report, figures):
    """Writes the scores and draws the figures, and says where they are."""
    files.write_json(out / "evaluation.json", report)
    drawn = cnnjax.run.report.draw_figures(out / "figures", figures)
    print(f"wrote {out / 'evaluation.json'} and {len(drawn)} figures in {out / 'figures'}")


def _of_filtered(logits_of, image_filter):
    from cnnjax.augment.filters import filter_images

    return lambda variables, image: logits_of(variables, filter_images(image, image_filter))


def _at_step(run):
    """Splits RUN@STEP into the directory and the step, or None for the run's own choice."""
    directory, at, step = run.rpartition("@")
    if not at or not step.isdecimal():
        return run, None
    return directory, int(step)


def _describe(names, members):
    if len(members) == 1:
        return f"{names[0]}, step {members[0].step}"
    return f"ensemble of {len(members)}: {', '.join(names)}"


def _compare(names, each, labels):
    """Prints and returns the accuracy of each member and how much they disagree."""
    disagreement = cnnjax.evaluation.ensemble.disagreement(np.exp(each))
    accuracies = np.mean(each.argmax(axis=-1) == labels, axis=1).tolist()
    print("\nmembers")
    for name, accuracy in zip(names, accuracies, strict=True):
        print(f"  {accuracy:.4f}  {name}")
    print(
        f"two members disagree on {disagreement['mean']:.2%} of the images, not all agree on "
        f"{disagreement['any']:.2%}"
    )
    return {"members": list(names), "accuracies": accuracies, "disagreement": disagreement}


def _calibrate(held, held_labels, logits, labels):
    """Fits a temperature to held-out predictions; prints and returns what it changes."""
    calibration = cnnjax.evaluation.calibration
    temperature = calibration.fit_temperature(held, held_labels)
    result = {"temperature": temperature, "fitted_on": len(held_labels)}
    print(f"\ntemperature {temperature:.4f}, fitted on {len(held_labels):,} validation images")
    for name, value in (("before", 1.0), ("after", temperature)):
        error = cnnjax.metrics.expected_calibration_error(
            calibration.apply_temperature(logits, value), labels
        )
        loss = calibration.negative_log_likelihood(logits, labels, value)
        print(f"  {name:<6}  calibration error {float(error):.4f}  loss {loss:.4f}")
        result[name] = {"expected_calibration_error": float(error), "loss": loss}
    return result


def _attack(config, attacks, logits_of, variables, dataset):
    """Prints and returns the accuracy under each attack, and the signs of masked gradients."""
    robust = cnnjax.robust
    size = cnnjax.data.split_size(dataset, config.split)
    count = min(config.attack_examples or size, size)
    attacked = cnnjax.data.shorten(dataset, {config.split: count})

    def batches():
        return cnnjax.data.split_batches(attacked, config.split, ATTACK_BATCH_SIZE)

    print(f"\naccuracy under attack, {count:,} images")
    accuracies = {}
    for attack in attacks:
        accuracies |= robust.robust_accuracies(logits_of, variables, batches, [attack])
        print(f"  {accuracies[str(attack)]:.4f}  {attack}", flush=True)
    result = {"examples": count, "accuracies": accuracies}
    if config.check_masking:
        strongest = min(attacks, key=lambda attack: accuracies[str(attack)])
        compared, signs = robust.masking(
            logits_of,
            variables,
            batches,
            strongest,
            num_classes=dataset.num_classes,
            image_shape=dataset.image_shape,
        )
        result["masking"] = {"of": str(strongest), "accuracies": compared, "signs": signs}
        print(f"signs of masked gradients, {strongest} compared with other attacks")
        print("  " + "  ".join(f"{name} {value:.4f}" for name, value in compared.items()))
        print("\n".join(f"  {sign}" for sign in signs) if signs else "  none found")
    return result
