"""Dataclasses with every knob of the chain: name, default, meaning and allowed values.

One file configures the whole chain, so the autoencoder, the token cache, the prior, the samples and the report of one
run cannot disagree. Names follow diffusers' training scripts where possible. The autoencoder: architecture.py; its
losses: losses.py; metadata of a knob: knobs.py; reading and checking: load.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Optional

from dae.config.architecture import AutoencoderConfig, AuxiliaryDecoderConfig
from dae.config.knobs import knob, section
from dae.config.losses import LossConfig

LARGEST_SEED = 2**63 - 1


@dataclass
class DataConfig:
    dataset_name: str = knob(
        "digits",
        "`digits`, `photos`, a Hugging Face id, a folder saved by `save_to_disk`, a folder of images, or a file, folder "
        "or glob of images, .parquet or WebDataset .tar files",
        path=True,
        role="place",
    )
    train_files: List[str] = knob(
        [], "files to train on instead of dataset_name: paths, folders or globs", path=True, role="place"
    )
    validation_files: List[str] = knob([], "held-out files instead of a split: paths, folders or globs", path=True, role="place")
    label_level: int = knob(
        1, "image folders: level of the folders below the split that are the classes; 0 reads no classes", ge=0
    )
    dataset_config_name: Optional[str] = knob(None, "configuration of a Hugging Face data set")
    train_split: str = knob("train", "split to train on")
    validation_split: Optional[str] = knob(
        None, "held-out split; null: `validation`, `test` or `val`, else rows held out of training; `none`: always such rows"
    )
    validation_size: int = knob(
        1000,
        "rows to hold out where there is no held-out split (at most a tenth of the rows), and the most that validation in "
        "training measures; chosen by a digest of the image, each class in proportion",
        ge=1,
    )
    streaming: bool = knob(False, "read as a stream, never the whole set: for sets larger than the disk")
    shuffle_buffer_size: int = knob(10000, "rows in the shuffle buffer of a stream", ge=1)
    max_train_samples: Optional[int] = knob(None, "training rows to use, chosen by the seed (of a stream by a digest)", ge=1)
    image_column: str = knob("auto", "column with the images; `auto` takes the only image column")
    label_column: str = knob(
        "auto", "column with labels; `auto` looks for `label`, `labels`, `cls`, in JSON too; `none` ignores them"
    )
    num_classes: Optional[int] = knob(None, "number of classes; null counts those that occur in training", ge=1)
    resolution: int = knob(8, "images are resized to resolution x resolution pixels", ge=1, le=16384)
    channels: int = knob(1, "1 for grey, 3 for RGB", choices=(1, 3))
    center_crop: bool = knob(True, "ADM centre crop (resize the short side, crop the middle); false squeezes to a square")
    random_flip: bool = knob(False, "mirror half of the training images, chosen at random", encoding="flip")
    random_affine: float = knob(
        0.0,
        "strength of random shift, rotation, scale in training: 1.0 is 12.5 % shift, 15 degrees, 15 % scale",
        ge=0,
        le=6,
        encoding="affine",
    )
    num_workers: int = knob(0, "processes that decode images, for each training process", ge=0, le=1024, role="free")
    allow_other: bool = knob(False, "encode, evaluate and measure other data than the autoencoder was trained on", role="free")
    verify_rows: int = knob(10000, "rows checked (image bytes, label) before training; -1 checks all, 0 none", ge=-1, role="free")
    on_error: str = knob(
        "raise",
        "a row that cannot be decoded: raise stops; skip lists it in <output_dir>/skipped.jsonl and leaves it out, in training "
        "replaced by the next good row of the data set",
        choices=("raise", "skip"),
        role="free",
    )
    max_skipped: float = knob(0.1, "skip: rows left out before the run stops: a share below 1, else a number", ge=0, role="free")


@dataclass
class OptimizationConfig:
    """Optimisation of one autoencoder stage, or of the prior."""

    max_train_steps: int = knob(1000, "optimiser steps", ge=1, role="length")
    train_batch_size: int = knob(
        64,
        "images per process and micro-batch; global batch = this x processes x gradient_accumulation_steps",
        ge=1,
        role="batch",
    )
    gradient_accumulation_steps: int = knob(1, "micro-batches per optimiser step", ge=1, le=100_000)
    learning_rate: float = knob(1e-3, "peak learning rate of AdamW", ge=0, le=1)
    lr_scheduler: str = knob("cosine", "shape after the warm-up", choices=("constant", "linear", "cosine"))
    lr_warmup_steps: int = knob(50, "steps of linear warm-up", ge=0)
    adam_beta1: float = knob(0.9, "AdamW's beta_1", ge=0, lt=1)
    adam_beta2: float = knob(0.99, "AdamW's beta_2", ge=0, lt=1)
    adam_weight_decay: float = knob(0.0, "AdamW's decoupled weight decay of matrices and kernels", ge=0, le=10)
    max_grad_norm: float = knob(1.0, "gradients are clipped to this norm; 0 does not clip", ge=0)
    gradient_checkpointing: bool = knob(False, "recompute activations in the backward pass: less memory, more time")
    use_ema: bool = knob(True, "keep an exponential moving average of the weights and deliver that")
    ema_decay: float = knob(0.999, "its decay, after a warm-up", ge=0, lt=1)


@dataclass
class StageConfig(OptimizationConfig):
    loss: LossConfig = section(LossConfig, "weights of the losses")


@dataclass
class SecondStageConfig(StageConfig):
    codebook: str = knob(
        "frozen",
        "frozen, as the encoder is; trainable: it goes on learning, so that the tokens of stage 1 are not those of stage 2",
        choices=("frozen", "trainable"),
        role="arm",
    )


@dataclass
class PriorConfig(OptimizationConfig):
    family: str = knob(
        "auto",
        "ar: autoregressive Transformer over VQ tokens; dit: Diffusion Transformer with flow matching over a KL latent; mixture: "
        "Gaussian mixture over a KL latent; auto: ar for vq, dit for kl",
        choices=("auto", "ar", "dit", "mixture"),
    )
    init_from: Optional[str] = knob(
        None,
        "ar, dit: start from the weights of a trained prior: output folder of a run, folder of a saved prior, or Hub id; classes "
        "start new if their number differs",
        path=True,
    )
    num_components: int = knob(16, "mixture: Gaussians", ge=1, le=1_000_000)
    width: int = knob(128, "channels of the residual stream", ge=1, le=65536)
    depth: int = knob(4, "number of Transformer blocks", ge=1, le=1000)
    num_heads: int = knob(4, "attention heads; width / num_heads is the head dimension", ge=1)
    dropout: float = knob(0.0, "dropout of embeddings and residual branches", ge=0, lt=1)
    class_dropout: float = knob(0.1, "probability of hiding the class, which classifier-free guidance needs", ge=0, lt=1)
    token_noise: float = knob(0.0, "probability that a token the prior reads in training is replaced by a random one", ge=0, lt=1)
    label_smoothing: float = knob(0.0, "share of each target spread over all tokens in training", ge=0, lt=1)
    z_loss: float = knob(
        0.0, "weight of the squared log-normaliser of the logits in training: keeps them from drifting", ge=0, weight=True
    )
    num_augmentations: int = knob(
        0, "further encodings of each training image in the cache, made by the two knobs below", ge=0, le=1000, encoding="copies"
    )
    code_temperature: float = knob(
        0.0,
        "vq: draw the codes of augmentations by exp(-distance / (this x mean distance to the nearest code)); 0 takes the nearest",
        ge=0,
        encoding="code_temperature",
    )
    augment_images: bool = knob(
        True, "augmentations encode augmented images (data.random_flip, data.random_affine), else the image itself"
    )
    early_stopping: bool = knob(
        True, "deliver the weights of the best validation (ar: fewest held-out bits; dit: least loss), not the last ones"
    )


@dataclass
class KernelsConfig:
    """Which implementation of each dae_kernels operation runs; not saved with a model, as it depends on the machine."""

    attention: str = knob(
        "auto", "attention of autoencoder and prior", choices=("auto", "sdpa", "flash_attn", "xformers", "flex", "reference")
    )
    group_norm_silu: str = knob("auto", "GroupNorm and SiLU of the autoencoder", choices=("auto", "reference", "triton"))
    linear_cross_entropy: str = knob(
        "auto", "loss of the prior, with its last matrix", choices=("auto", "reference", "torch", "chunked", "triton")
    )
    lpips: str = knob("auto", "distance of features in the perceptual loss", choices=("auto", "reference", "triton"))
    vector_quantize: str = knob("auto", "search for the nearest code", choices=("auto", "reference", "triton"))


@dataclass
class SamplingConfig:
    num_samples: int = knob(2000, "images to sample, classes in equal parts", ge=1)
    classes: List[str] = knob(
        [], "sample these classes alone, as in [cat,dog] or [1990,2020]: names, or else labels as they are in the data; none: all"
    )
    batch_size: int = knob(500, "images sampled at once", ge=1)
    num_inference_steps: int = knob(32, "dit: steps of the ODE solver from noise to latent", ge=1, le=10_000)
    cfg_scale: float = knob(1.0, "classifier-free guidance: 1 samples the model, more trades variety for fidelity", ge=0, le=100)
    temperature: float = knob(1.0, "divides the logits; below 1 is safer, above 1 more varied", ge=0, le=100)
    top_k: Optional[int] = knob(None, "keep only the k likeliest tokens", ge=1)
    top_p: Optional[float] = knob(None, "keep only the likeliest tokens that together have this probability", gt=0, le=1)
    cuda_graphs: bool = knob(False, "ar on a GPU: start all kernels of a token by one call; the same up to rounding")


@dataclass
class EvaluationConfig:
    classifier_steps: int = knob(800, "training steps of the classifier whose features and verdicts metrics use", ge=1, le=10**6)
    max_images: int = knob(10000, "images of a split to measure on, chosen at random where there are more", ge=1)
    cfg_scales: List[float] = knob([1.0, 1.5, 2.0], "guidance scales of the table in the report", ge=0, le=100)
    neighbours: int = knob(3, "k of precision and recall", ge=1)
    batch_size: int = knob(500, "images evaluated at once", ge=1, encoding="batch_size")


@dataclass
class CompareConfig:
    """What recipes/compare.py trains: arms x seeds, all on one data set, one latent type and one decoder."""

    arms: List[str] = knob(
        ["joint", "joint_dropout", "joint_finetuned", "weak", "dae-linear", "dae-narrow", "dae-shallow", "dae-dropout"],
        "arms by name (recipes/compare.py --help lists them), or `name: key=value key=value` for one of your own",
    )
    baseline: str = knob("joint", "the arm that the others are held against, pair by pair of seeds")
    seeds: List[int] = knob([0, 1, 2, 3, 4], "seeds; each trains every arm once", ge=0, le=LARGEST_SEED)
    learning_rates: List[float] = knob(
        [1e-3, 2e-3, 4e-3], "learning rates to tune each arm with, all arms by as many trials; one value tunes none", gt=0, le=1
    )
    prior_learning_rates: List[float] = knob(
        [], "learning rates of the prior (ar, dit) tried with each of the above; none: prior.learning_rate", gt=0, le=1
    )
    tuning_seed: int = knob(
        1000, "seed of the tuning trials, on images held out of the training set; not among the seeds", ge=0, le=LARGEST_SEED
    )
    rates: List[float] = knob([], "further codebook sizes (vq) or KL weights (kl) for rate_arms; none draws no frontier", ge=0)
    rate_arms: List[str] = knob(["joint", "dae-linear"], "arms that get the further rates and priors")
    other_rates: List[float] = knob(
        [], "those of `rates` that rate_arms other than the baseline get (all are held against its frontier); none: all", ge=0
    )
    prior_widths: List[int] = knob(
        [],
        "further priors of rate_arms: widths of ar and dit (learning rate ~ 1 / width), components of a mixture",
        ge=1,
        le=65536,
    )
    processes: int = knob(2, "trials that run at the same time, one thread each", ge=1, le=1024)


@dataclass
class MeasureConfig:
    """What recipes/measure_latent.py and recipes/report_latent.py measure."""

    latents: List[str] = knob(
        ["gaussian", "uniform", "mixture", "pca"],
        "latents: gaussian, uniform, mixture, pca, features:<timm name or folder>, autoencoder:<folder of a run>, "
        "ae, vae, vq, dae (trained here by this configuration), or package.module:function",
    )
    latent_dim: int = knob(16, "dimensions of gaussian, uniform, mixture and pca", ge=1, le=65536)
    distances: List[str] = knob(["sinkhorn", "frechet"], "distances D of D^G, by the names of dae.complexity")
    families: List[str] = knob(["linear", "mlp"], "generator families G: linear, mlp, lipschitz, conv, dropout")
    seeds: List[int] = knob([0, 1, 2], "seeds of the estimators", ge=0, le=LARGEST_SEED)
    steps: int = knob(500, "training steps of a generator", ge=1, le=1_000_000)
    max_images: int = knob(2000, "images measured on, chosen at random where there are more", ge=2)
    compare_folders: List[str] = knob(
        [], "report card: output folders of recipes/compare.py, whose trials say how well each predictor ranks latents", path=True
    )


@dataclass
class RefitConfig:
    """What recipes/refit.py does beside stage 2."""

    decoder: str = knob(
        "old", "start from the decoder of init_from, or from a new one of autoencoder.decoder's family", choices=("old", "new")
    )
    features: Optional[str] = knob(
        None,
        "network in whose features the decoders are compared: a model of timm, or a folder in timm's format; null trains a "
        "small classifier on the images",
        path=True,
        role="judging",
    )


@dataclass
class Config:
    method: str = knob(
        "dae",
        "dae: weak auxiliary decoder first, then the real decoder on the frozen latent; joint: one stage with the real decoder; "
        "joint_dropout: the same with dropout in it; joint_finetuned: joint, then its decoder alone on the frozen latent; "
        "weak: one stage with the auxiliary decoder; refit: of recipes/refit.py, the decoder alone on the latent of init_from",
        choices=("dae", "joint", "joint_dropout", "joint_finetuned", "weak", "refit"),
        role="arm",
        run="autoencoder",
    )
    output_dir: str = knob("runs/digits", "folder of the run", path=True, role="free")
    seed: int = knob(0, "seed of everything random; one seed, one result", ge=0, le=LARGEST_SEED, encoding="seed")
    mixed_precision: Optional[str] = knob(
        None, "no, fp16 or bf16; null leaves it to `accelerate launch --mixed_precision`", choices=(None, "no", "fp16", "bf16")
    )
    compile: bool = knob(False, "compile the models with torch.compile", role="free")
    cuda_graphs: bool = knob(
        False,
        "training on a GPU in one process: record the step once and start all of its kernels by one call: the same results, and "
        "no waiting for Python",
        role="free",
    )
    channels_last: bool = knob(False, "keep feature maps of the autoencoder in memory as NHWC, which convolutions on GPUs prefer")
    cudnn_benchmark: bool = knob(
        True,
        "training on a GPU: cuDNN times its algorithms for each new shape and keeps the fastest, so that rounding may differ "
        "between runs; false lets it choose by rules",
        role="free",
    )
    allow_tf32: bool = knob(
        True,
        "training on a GPU: float32 convolutions and matrix products round their operands to TF32, 10 bits of mantissa instead "
        "of 23, which tensor cores multiply; false computes in float32; bf16 and fp16 are not affected",
        role="free",
    )
    report_to: str = knob("tensorboard", "accelerate's tracker", choices=("none", "tensorboard", "wandb", "trackio"), role="free")
    logged_images: int = knob(
        8, "reconstructions and samples that each validation shows in the tracker; 0 shows none", ge=0, le=1000, role="free"
    )
    preflight: bool = knob(
        True, "before training, take a few steps on copies and refuse what does not train: see docs/training.md", role="free"
    )
    logging_steps: int = knob(10, "steps between two entries of the training log", ge=1, role="free")
    validation_steps: int = knob(200, "steps between validations, each of at most as many images as were trained on since", ge=1)
    checkpointing_steps: int = knob(500, "steps between two checkpoints", ge=1, role="free")
    checkpoints_total_limit: int = knob(2, "checkpoints to keep", ge=1, role="free")
    resume_from_checkpoint: Optional[str] = knob(
        None, "`latest`, or the path of a checkpoint folder; null starts a new run", path=True, role="free"
    )
    init_from: Optional[str] = knob(
        None,
        "start the autoencoder from trained weights: output folder of a run, folder of a saved autoencoder, Hub id, or folder of "
        "diffusers' AutoencoderKL or VQModel; encoder, bottleneck, and the decoder of each stage if one of that architecture is "
        "there",
        path=True,
    )
    save_discriminator: bool = knob(
        False, "save the discriminator of each stage that trains one, in a folder `discriminator` beside its model", role="free"
    )
    push_to_hub: bool = knob(False, "upload the trained model", role="free")
    hub_model_id: Optional[str] = knob(None, "repository to upload to", role="free")
    data: DataConfig = section(DataConfig, "images")
    autoencoder: AutoencoderConfig = section(AutoencoderConfig, "architecture", run="autoencoder")
    auxiliary_decoder: AuxiliaryDecoderConfig = section(
        lambda: AuxiliaryDecoderConfig(family="narrow"), "the weak decoder of stage 1", role="arm", run="autoencoder"
    )
    stage1: StageConfig = section(StageConfig, "encoder, quantizer and auxiliary decoder", run="autoencoder")
    stage2: SecondStageConfig = section(SecondStageConfig, "the real decoder on the frozen latent", run="autoencoder")
    refit: RefitConfig = section(RefitConfig, "a better decoder for a given latent", run="autoencoder")
    prior: PriorConfig = section(PriorConfig, "prior over the latent", run="prior")
    kernels: KernelsConfig = section(KernelsConfig, "which implementation of an operation runs, where it runs", role="free")
    sampling: SamplingConfig = section(SamplingConfig, "sampling", role="judging")
    evaluation: EvaluationConfig = section(EvaluationConfig, "metrics", role="judging")
    measure: MeasureConfig = section(MeasureConfig, "distances between a latent and the data", role="free")
    compare: CompareConfig = section(CompareConfig, "arms of a comparison", role="free")
