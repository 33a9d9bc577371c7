"""The catalogue: one record per post, from the post to its code, experiment and tests. Data only.

Papers are keys of `references.bib`; paths are relative to the repository.

>>> find("S30").title
'DDPM as an autoregressive VAE'
"""

import dataclasses

TOTAL_POSTS = 38


@dataclasses.dataclass(frozen=True)
class Post:
    """One post and everything that was built from it.

    Attributes:
      slug: row of the plan, `S01` to `S38`.
      title: the post's subject, in our words.
      method: the field's name for it.
      urls: the post, then those it builds on.
      papers: keys of `references.bib`.
      modules: files of the library, the method's own first.
      experiments: the scripts.
      configs: their configs, in the same order.
      tests: files that hold the oracles.
    """

    slug: str
    title: str
    method: str
    urls: tuple[str, ...]
    papers: tuple[str, ...]
    modules: tuple[str, ...]
    experiments: tuple[str, ...]
    configs: tuple[str, ...]
    tests: tuple[str, ...]


POSTS = (
    Post(
        slug="S01",
        title="Lion, the optimiser found by search; Tiger; embeddings that drift",
        method="Lion, alone and by vote; Tiger; lazy rows; accumulation; stochastic rounding",
        urls=(
            "https://kexue.fm/archives/9473",
            "https://kexue.fm/archives/9512",
            "https://kexue.fm/archives/9736",
            "https://kexue.fm/archives/8634",
        ),
        papers=(
            "chen2023symbolic",
            "liang2024cautious",
            "liu2024distributed",
            "bernstein2019signsgd",
            "ishikawa2024lioncub",
            "yong2020gradient",
        ),
        modules=(
            "blogjax/optim/lion.py",
            "blogjax/optim/tiger.py",
            "blogjax/optim/hidden_accumulation.py",
            "blogjax/optim/sign_power.py",
            "blogjax/optim/sparse_rows.py",
            "blogjax/optim/majority_vote.py",
            "blogjax/optim/per_device_state.py",
            "blogjax/optim/accumulate.py",
            "blogjax/optim/stochastic_rounding.py",
            "blogjax/optim/normalize.py",
        ),
        experiments=("experiments/lion_embedding_drift.py", "experiments/lion_vs_adamw.py"),
        configs=("configs/lion_embedding_drift.py", "configs/lion_vs_adamw.py"),
        tests=(
            "tests/conformance/test_optimisers.py",
            "tests/optim/test_lion.py",
            "tests/optim/test_majority_vote.py",
            "tests/optim/test_tiger.py",
            "tests/optim/test_hidden_accumulation.py",
            "tests/optim/test_sign_power.py",
            "tests/optim/test_errata.py",
        ),
    ),
    Post(
        slug="S02",
        title="WGAN's Lipschitz constraint by gradient normalisation",
        method="adversarial task; GN, GraN, SN and clipped critics; WGAN-GP, R1, R2, DRAGAN",
        urls=("https://kexue.fm/archives/8757",),
        papers=(
            "wu2021gradient",
            "bhaskara2022gran",
            "gulrajani2017improved",
            "mescheder2018training",
            "kodali2017convergence",
            "arjovsky2017wasserstein",
            "miyato2018spectral",
            "radford2016unsupervised",
            "lim2017geometric",
            "goodfellow2014generative",
            "mao2017least",
        ),
        modules=(
            "blogjax/gradients/normalization.py",
            "blogjax/gradients/penalties.py",
            "blogjax/gradients/input_gradient.py",
            "blogjax/tasks/adversarial.py",
            "blogjax/tasks/critics.py",
            "blogjax/losses/adversarial.py",
            "blogjax/models/gan.py",
            "blogjax/models/dcgan.py",
            "blogjax/models/resnet_gan.py",
            "blogjax/nn/spectral_norm.py",
        ),
        experiments=("experiments/gan.py", "experiments/gan_ring_2d.py"),
        configs=("configs/gan.py", "configs/gan_ring_2d.py"),
        tests=(
            "tests/gradients/test_normalization.py",
            "tests/gradients/test_penalties.py",
            "tests/gradients/test_input_gradient.py",
            "tests/tasks/test_adversarial_task.py",
            "tests/tasks/test_adversarial_options.py",
            "tests/tasks/test_critics.py",
            "tests/losses/test_adversarial_losses.py",
            "tests/models/test_gan.py",
            "tests/nn/test_spectral_norm.py",
            "tests/metrics/test_sliced_wasserstein.py",
            "tests/integration/test_gan_digits.py",
            "tests/integration/test_gan_slopes.py",
            "tests/integration/test_gan_cifar10.py",
            "tests/integration/test_gan_ring_2d.py",
        ),
    ),
    Post(
        slug="S03",
        title="an inequality between input and parameter gradient penalties; adversarial training",
        method="gradient bound, per-example norms, FGM, PGD, VAT, SAM, flooding, input smoothness",
        urls=(
            "https://kexue.fm/archives/8796",
            "https://kexue.fm/archives/7234",
            "https://kexue.fm/archives/7466",
            "https://kexue.fm/archives/7643",
            "https://kexue.fm/archives/7787",
        ),
        papers=(
            "dherin2021geometric",
            "goodfellow2015efficient",
            "goodfellow2015explaining",
            "madry2018towards",
            "miyato2017adversarial",
            "ross2018improving",
            "miyato2018virtual",
            "bishop1995training",
            "foret2021sharpness",
            "zhao2022penalizing",
            "barrett2021implicit",
            "ishida2020need",
        ),
        modules=(
            "blogjax/gradients/gradient_bound.py",
            "blogjax/gradients/per_example.py",
            "blogjax/gradients/adversarial.py",
            "blogjax/gradients/virtual_adversarial.py",
            "blogjax/gradients/perturbation.py",
            "blogjax/gradients/sharpness.py",
            "blogjax/gradients/smoothness.py",
        ),
        experiments=(
            "experiments/gradient_penalty_inequality.py",
            "experiments/adversarial_digits.py",
            "experiments/vat_digits.py",
        ),
        configs=(
            "configs/gradient_penalty_inequality.py",
            "configs/adversarial_digits.py",
            "configs/vat_digits.py",
        ),
        tests=(
            "tests/gradients/test_gradient_bound.py",
            "tests/gradients/test_per_example.py",
            "tests/gradients/test_adversarial.py",
            "tests/gradients/test_virtual_adversarial.py",
            "tests/gradients/test_sharpness.py",
            "tests/gradients/test_smoothness.py",
        ),
    ),
    Post(
        slug="S04",
        title="multi-task learning 1: in the name of the loss",
        method="initial, prior, inverse, generalised-mean and learnt weights; normalised gradients",
        urls=("https://kexue.fm/archives/8870",),
        papers=("chen2018gradnorm", "kendall2018multi", "liu2019end"),
        modules=(
            "blogjax/multitask/loss_weighting.py",
            "blogjax/multitask/gradient_normalized.py",
            "blogjax/tasks/multitask.py",
        ),
        experiments=("experiments/multitask_digits.py",),
        configs=("configs/multitask_digits.py",),
        tests=(
            "tests/multitask/test_loss_weighting.py",
            "tests/multitask/test_gradient_normalized.py",
            "tests/tasks/test_multitask_task.py",
            "tests/tasks/test_multitask_arguments.py",
            "tests/integration/test_multitask_digits.py",
        ),
    ),
    Post(
        slug="S05",
        title="multi-task learning 2: acting on gradients",
        method="exact MGDA from the Gram matrix; PCGrad, CAGrad, UPGrad; task gradients one by one",
        urls=("https://kexue.fm/archives/8896",),
        papers=(
            "desideri2012multiple",
            "sener2018multi",
            "yu2020gradient",
            "liu2021conflict",
            "quinton2024jacobian",
        ),
        modules=(
            "blogjax/multitask/min_norm.py",
            "blogjax/multitask/gram.py",
            "blogjax/multitask/task_gradients.py",
            "blogjax/multitask/aggregate.py",
            "blogjax/multitask/combiner.py",
            "blogjax/multitask/pcgrad.py",
            "blogjax/multitask/cagrad.py",
            "blogjax/multitask/upgrad.py",
        ),
        experiments=(
            "experiments/multitask_digits.py",
            "experiments/pareto_front_2d.py",
            "experiments/multitask_images.py",
        ),
        configs=(
            "configs/multitask_digits.py",
            "configs/pareto_front_2d.py",
            "configs/multitask_images.py",
        ),
        tests=(
            "tests/conformance/test_combiners.py",
            "tests/multitask/test_min_norm.py",
            "tests/multitask/test_gram.py",
            "tests/multitask/test_task_gradients.py",
            "tests/multitask/test_aggregate.py",
            "tests/multitask/test_pcgrad.py",
            "tests/multitask/test_cagrad.py",
            "tests/multitask/test_upgrad.py",
            "tests/multitask/test_torchjd.py",
            "tests/integration/test_pareto_front_2d.py",
            "tests/integration/test_two_losses.py",
            "tests/integration/test_multitask_images.py",
        ),
    ),
    Post(
        slug="S06",
        title="multi-task learning 3: primary and auxiliary tasks",
        method="projection to the dual cone, exact; mixed tasks; weight decay without coefficient",
        urls=("https://kexue.fm/archives/8907",),
        papers=("lopezpaz2017gradient", "wang2021gradient"),
        modules=(
            "blogjax/multitask/primary_auxiliary.py",
            "blogjax/multitask/mixed.py",
            "blogjax/multitask/nonnegative_least_squares.py",
            "blogjax/multitask/coefficient_free_weight_decay.py",
        ),
        experiments=(
            "experiments/primary_auxiliary_digits.py",
            "experiments/pareto_front_2d.py",
        ),
        configs=(
            "configs/primary_auxiliary_digits.py",
            "configs/pareto_front_2d.py",
        ),
        tests=(
            "tests/multitask/test_primary_auxiliary.py",
            "tests/multitask/test_mixed.py",
            "tests/multitask/test_nonnegative_least_squares.py",
            "tests/multitask/test_coefficient_free_weight_decay.py",
            "tests/integration/test_primary_auxiliary_digits.py",
        ),
    ),
    Post(
        slug="S30",
        title="DDPM as an autoregressive VAE",
        method="DDPM: noise schedules, denoising loss, exact ELBO",
        urls=("https://kexue.fm/archives/9152", "https://kexue.fm/archives/9119"),
        papers=("ho2020denoising", "nichol2021improved", "salimans2022progressive"),
        modules=(
            "blogjax/diffusion/gaussian.py",
            "blogjax/diffusion/schedules.py",
            "blogjax/diffusion/prediction.py",
            "blogjax/diffusion/elbo.py",
            "blogjax/models/unet.py",
            "blogjax/tasks/denoising.py",
        ),
        experiments=("experiments/ddpm.py",),
        configs=("configs/ddpm.py",),
        tests=("tests/diffusion/test_elbo.py", "tests/diffusion/test_gaussian_diffusion.py"),
    ),
    Post(
        slug="S31",
        title="DDPM as Bayes and denoising; DDIM",
        method="DDIM: reverse steps between any two times, samplers, inversion",
        urls=("https://kexue.fm/archives/9164", "https://kexue.fm/archives/9181"),
        papers=("ho2020denoising", "song2021denoising"),
        modules=("blogjax/diffusion/sampling.py", "blogjax/diffusion/reverse.py"),
        experiments=("experiments/ddpm.py",),
        configs=("configs/ddpm.py",),
        tests=("tests/diffusion/test_reverse.py", "tests/diffusion/test_diffusion_sampling.py"),
    ),
)

NEXT = ("posts on language models, architectures and generative models",)


def find(slug: str) -> Post:
    """Returns the post of a row.

    Raises:
      KeyError: naming the rows there are.
    """
    for post in POSTS:
        if post.slug == slug:
            return post
    raise KeyError(f"no post {slug!r}; built so far: {', '.join(p.slug for p in POSTS)}")
