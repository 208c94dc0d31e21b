"""A DCGAN on MNIST: two networks, two optimizers, one step.

Radford, Metz and Chintala 2016, "Unsupervised Representation Learning with Deep Convolutional
Generative Adversarial Networks" (arXiv 1511.06434), sections 3 and 4: batch norm, Adam with rate
2e-4 and beta1 0.5, weights of standard deviation 0.02. Half as wide here, in batches of 64.

    python -m experiments.dcgan_mnist

`RUN/samples` has a sheet of the same 64 noise vectors after each epoch. The score is the Fréchet
distance (arXiv 1706.08500, equation 6) of as many samples as there are images, in the 84 features
that enter the head of a LeNet-5; `RUN/features` is the run that trains it first, of two epochs
(98.73% right). It is no FID of Inception's and compares with nothing but these, of seed 0; other
noise moves it by about 2:

    6,000 validation images   after epoch 1 135.40, 2 95.66, 4 67.54, 6 59.37, 8 56.24, 12 52.18
                              one half to the other 2.57, images of noise 706.60
    10,000 test images        after epoch 12 54.91; one half to the other 1.80, noise 721.56

By eye about half of the last 64 samples are clear digits, most others nearly one. It took 421 s of
CPU time on a 2-core AMD EPYC busy with other work. Other seeds were not measured.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import optax

import cnnjax
from cnnjax.errors import UserError
from cnnjax.models.dcgan import dcgan
from cnnjax.run import classifier, load, settings, trainer
from cnnjax.run.recipe import Recipe
from cnnjax.tasks import generation
from cnnjax.train import gan
from cnnjax.train.precision import compute_dtype, of_platform

LATENT_SIZE, ADAM_BETA1 = 100, 0.5  # Figure 1; section 4.


@dataclasses.dataclass(frozen=True)
class Config(settings.Settings):
    """A DCGAN on MNIST: trains, draws samples after each epoch, measures their distance."""

    width: int = 32
    """Channels at half the size of the image; twice as many at a quarter."""

    learning_rate: float = 2e-4
    """Of both networks."""

    ema_decay: float = 0.999
    """Decay of the moving average of the generator that makes the samples; 0 keeps none."""

    epochs: int = 12


def main(config: Config) -> int:
    """Trains the features, then the two networks, and tests them; returns the exit code."""
    if config.precision == "float16" or config.accumulate > 1 or config.remat:
        raise UserError("the step of a GAN has no --precision float16, --accumulate or --remat.")
    trainer.start(config)
    if code := train_features(config):
        return code
    return trainer.train(config, recipe(config))


def recipe(config: Config) -> Recipe:
    """Returns what `trainer.train` needs."""
    images = cnnjax.data.load("mnist", seed=config.seed)
    dataset = generation.with_places(images)
    arguments = {"width": config.width, "latent_size": LATENT_SIZE}
    model = dcgan(images.image_shape, **arguments, dtype=compute_dtype(config.precision))
    adam = optax.adam(config.learning_rate, b1=ADAM_BETA1)
    # Read when they are needed: a plan may come before there is a run of the features.
    lenet = functools.cache(lambda: load.load_trained(Path(config.run_dir) / "features"))
    key = jax.random.key(0)  # Of the evaluation's noise, whatever the run's seed.
    return Recipe(
        dataset=trainer.shrink(dataset) if config.smoke else dataset,
        task=generation.generation(
            latent_size=LATENT_SIZE, features=lambda image: lenet().features(image), key=key
        ),
        model=model,
        optimizer=gan.both_optimizers(adam, adam),
        make_step=lambda axis_name: gan.make_gan_step(
            model.generator,
            model.discriminator,
            adam,
            adam,
            latent_size=LATENT_SIZE,
            schedule=optax.constant_schedule(config.learning_rate),
            ema_decay=config.ema_decay,
            axis_name=axis_name,
        ),
        normalize=gan.as_symmetric,
        metadata=lambda: {"model": "dcgan", "arguments": arguments},
        ema=config.ema_decay > 0,
        precision=of_platform(config.precision),
        after_validation=generation.make_draw(model.generator, key=key),
    )


def train_features(config: Config) -> int:
    """Starts, continues or leaves alone the run of the LeNet-5; returns the exit code."""
    if config.plan:
        return 0
    lenet = classifier.Config(model="lenet5", epochs=2, learning_rate=3e-3, smoke=config.smoke)
    return classifier.train_part(lenet, Path(config.run_dir) / "features")


if __name__ == "__main__":
    settings.launch(Config, main)
