"""Small random models, written in every published layout.

Made with diffusers and transformers alone, and renamed by hand (tests/bfl_names.py), so that a mistake in
`kontext.checkpoints` cannot hide behind itself.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from tests.bfl_names import bfl_autoencoder, bfl_transformer

WIDTH, HEADS, DOUBLE, SINGLE = 64, 2, 2, 2
CONTEXT_WIDTH, VECTOR_WIDTH, TEXT_LENGTH = 32, 24, 16
AXES = (4, 14, 14)
AE_WIDTHS = (32, 64, 64, 64)
AE_SCALE, AE_SHIFT = 0.3611, 0.1159
T5_WORDS = (
    "make",
    "the",
    "red",
    "green",
    "blue",
    "circle",
    "square",
    "background",
    "remove",
    "a",
    "picture",
    "it",
)


@dataclass(frozen=True)
class TinyFiles:
    """Paths of one small Kontext. All weights are float32, and equal in all layouts of one model."""

    root: Path
    dit: Path  # BFL names
    dit_prefixed: Path  # BFL names behind `model.diffusion_model.`
    dit_no_guidance: Path  # BFL names, other weights, no guidance_in
    dit_diffusers: Path  # diffusers names, one file
    dit_sharded: Path  # folder: diffusers names, several files with an index
    vae: Path  # BFL names
    vae_diffusers: Path  # diffusers names, one file without config
    t5: Path  # ComfyUI single file
    clip: Path  # ComfyUI single file
    t5_sharded: Path  # Hugging Face folder, several files with an index
    t5_tokenizer: Path  # folder
    clip_tokenizer: Path  # folder
    pipeline: Path  # folder: FluxKontextPipeline with the same weights
    pipeline_no_guidance: Path  # folder: the transformer of dit_no_guidance, diffusers layout


def build(root: Path) -> TinyFiles:
    """Write everything under `root` (about 10 MB)."""
    root.mkdir(parents=True, exist_ok=True)
    files = TinyFiles(
        root=root,
        dit=root / "flux1-kontext-dev.safetensors",
        dit_prefixed=root / "flux1-kontext-prefixed.safetensors",
        dit_no_guidance=root / "flux1-no-guidance.safetensors",
        dit_diffusers=root / "flux1-kontext-diffusers.safetensors",
        dit_sharded=root / "dit_sharded",
        vae=root / "ae.safetensors",
        vae_diffusers=root / "ae-diffusers.safetensors",
        t5=root / "t5xxl_fp16.safetensors",
        clip=root / "clip_l.safetensors",
        t5_sharded=root / "t5_sharded",
        t5_tokenizer=root / "t5_tokenizer",
        clip_tokenizer=root / "clip_tokenizer",
        pipeline=root / "pipeline",
        pipeline_no_guidance=root / "pipeline_no_guidance",
    )
    write_t5_tokenizer(files.t5_tokenizer)
    write_clip_tokenizer(files.clip_tokenizer)
    models = SimpleNamespace(
        dit=make_transformer(seed=1),
        dit_no_guidance=make_transformer(seed=2, guidance=False),
        vae=make_autoencoder(seed=3),
        t5=make_t5(seed=4),
        clip=make_clip(seed=5),
    )
    _write_dit(files, models.dit, models.dit_no_guidance)
    _write_vae(files, models.vae)
    _write_text_encoders(files, models.t5, models.clip)
    _write_pipeline(files, models)
    return files


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Every parameter gets a random value, biases and norms too, at sizes that keep activations near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise * p[0].numel() ** -0.5)
            elif name.endswith("weight"):
                p.copy_(1 + 0.2 * noise)
            else:
                p.copy_(0.1 * noise)
    return model.eval()


def make_transformer(seed: int, guidance: bool = True, width: int = WIDTH, blocks: int = 2) -> Any:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=64,
        num_layers=blocks,
        num_single_layers=blocks,
        attention_head_dim=width // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=CONTEXT_WIDTH,
        pooled_projection_dim=VECTOR_WIDTH,
        guidance_embeds=guidance,
        axes_dims_rope=tuple(a * width // WIDTH for a in AXES),
    )
    return randomise(model, seed)


def make_autoencoder(seed: int) -> Any:
    from diffusers import AutoencoderKL

    levels = len(AE_WIDTHS)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=AE_WIDTHS,
        layers_per_block=1,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=AE_SCALE,
        shift_factor=AE_SHIFT,
    )
    return randomise(model, seed)


def make_t5(seed: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(t5_pieces()),
        d_model=CONTEXT_WIDTH,
        d_kv=16,
        d_ff=48,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=32,
        dropout_rate=0.1,
    )
    model = randomise(T5EncoderModel(config), seed)
    model.shared.weight.data.mul_(CONTEXT_WIDTH**0.5)
    for block in model.encoder.block:  # T5 does not divide attention by sqrt(d_kv): its initialisation does
        block.layer[0].SelfAttention.q.weight.data.mul_(config.d_kv**-0.5)
    return model


def make_clip(seed: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    vocabulary = len(clip_vocabulary())
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=VECTOR_WIDTH,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=1,
        hidden_act="quick_gelu",
        max_position_embeddings=77,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    return randomise(CLIPTextModel(config), seed)


def _write_dit(files: TinyFiles, dit: Any, no_guidance: Any) -> None:
    state = dit.state_dict()
    bfl = bfl_transformer(state, DOUBLE, SINGLE)
    save_file(bfl, files.dit)
    save_file({f"model.diffusion_model.{k}": v for k, v in bfl.items()}, files.dit_prefixed)
    save_file(state, files.dit_diffusers)
    save_file(bfl_transformer(no_guidance.state_dict(), DOUBLE, SINGLE), files.dit_no_guidance)
    dit.save_pretrained(files.dit_sharded, max_shard_size="500KB")
    no_guidance.save_pretrained(files.pipeline_no_guidance / "transformer")


def _write_vae(files: TinyFiles, vae: Any) -> None:
    save_file(bfl_autoencoder(vae.state_dict(), len(AE_WIDTHS)), files.vae)
    save_file(vae.state_dict(), files.vae_diffusers)


def _write_text_encoders(files: TinyFiles, t5: Any, clip: Any) -> None:
    state = {k: v for k, v in t5.state_dict().items() if k != "encoder.embed_tokens.weight"}
    save_file(state, files.t5)
    t5.save_pretrained(files.t5_sharded, max_shard_size="40KB")
    named = {"text_model." + k.removeprefix("text_model."): v for k, v in clip.state_dict().items()}
    save_file(named, files.clip)


def _write_pipeline(files: TinyFiles, models: SimpleNamespace) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline
    from transformers import CLIPTokenizer, T5TokenizerFast

    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    FluxKontextPipeline(
        scheduler=scheduler,
        vae=models.vae,
        transformer=models.dit,
        text_encoder=models.clip,
        tokenizer=CLIPTokenizer.from_pretrained(files.clip_tokenizer),
        text_encoder_2=models.t5,
        tokenizer_2=T5TokenizerFast.from_pretrained(files.t5_tokenizer),
    ).save_pretrained(files.pipeline)


# ---- tokenizers ----


def t5_pieces() -> list[tuple[str, float]]:
    """Unigram pieces with log probabilities: special tokens first, as in T5, then words, then letters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0 - 0.01 * i) for i, word in enumerate(T5_WORDS)]
    return pieces + [(letter, -8.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789,.-"]


def write_t5_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.Unigram(t5_pieces(), unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "T5Tokenizer",
        "model_max_length": 512,
        "extra_ids": 0,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def clip_vocabulary() -> dict[str, int]:
    """Byte-level letters, the same at a word's end, three merges, and the two marks with the highest ids."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    tokens = letters + [f"{letter}</w>" for letter in letters] + ["re", "red</w>", "th", "the</w>"]
    return {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}


def write_clip_tokenizer(folder: Path) -> None:
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(clip_vocabulary()))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\nt h\nth e</w>\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
