"""`evaluate`: does the model draw what held-out captions say, and how near are its pictures to real drawings?"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.attributes import ATTRIBUTES, PLACES, labels, predictions
from training.captions import describe
from training.classifier import ShapesClassifier, labelled_drawings, load_classifier
from training.drawing import RELATIONS, Scene, sample_scenes
from training.figures import gate, record_figures
from training.parts import MODEL_DIR, device, load_text, load_tiny, load_unet, load_vae
from training.pool import embed_all
from training.samples import write_samples
from training.sampling import decode, euler, initial_noise
from training.text import tokenize
from training.tiny import decoder_psnr_db
from training.vae import reconstruction_psnr_db

GATE_ACCURACY = 0.90
RECOMMENDED_STEPS = 4
RECOMMENDED_GUIDANCE = 1.0
_BATCH = 50
_SCENE_SEED, _NOISE_SEED = 11, 100_000

_COLUMN = {name: index for index, name in enumerate(ATTRIBUTES)}
_FIRST, _SECOND = slice(0, 3), slice(3, 6)  # color, shape, size of each item
_RELATION_CLASSES = [1 + PLACES.index(name) for name in RELATIONS]


@dataclass(frozen=True)
class Setting:
    """What is measured: which UNet, how many Euler steps, how much guidance, over how many images."""

    unet: str = "unet"
    steps: int = RECOMMENDED_STEPS
    guidance_scale: float = RECOMMENDED_GUIDANCE
    images: int = 2000


def attribute_accuracy(seen: Tensor, wanted: Tensor) -> dict[str, float]:
    """Accuracy per attribute, over all of them, and the share of images without an error: seen and wanted [N, 8].

    A relation is right when the arrangement is, and the two items are not nearer to the caption the other way round.
    """
    pair = wanted[:, _COLUMN["shape_2"]] > 0
    hit = seen == wanted
    swapped = (seen[:, _FIRST] == wanted[:, _SECOND]).sum(1) + (seen[:, _SECOND] == wanted[:, _FIRST]).sum(1)
    in_order = swapped <= hit[:, _FIRST].sum(1) + hit[:, _SECOND].sum(1)
    place = hit[:, _COLUMN["place"]]
    parts = {
        name: torch.cat([hit[:, _COLUMN[f"{name}_1"]], hit[pair, _COLUMN[f"{name}_2"]]])
        for name in ("color", "shape", "size")
    }
    parts |= {
        "position": place[~pair],
        "background": hit[:, _COLUMN["background"]],
        "relation": (place & in_order)[pair],
    }
    figures = {name: _share(part) for name, part in parts.items()}
    return {"accuracy": _share(torch.cat(list(parts.values())))} | figures | {"all_right": _share(hit.all(1))}


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features [N, D]."""
    first, second = first.double(), second.double()
    root = _square_root(torch.cov(first.T))
    cross = _square_root(root @ torch.cov(second.T) @ root)
    spread = torch.trace(torch.cov(first.T) + torch.cov(second.T) - 2 * cross)
    return float((first.mean(0) - second.mean(0)).square().sum() + spread)


def _square_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def _share(hits: Tensor) -> float:
    return round(float(hits.float().mean()), 4)


@torch.no_grad()
def generate_and_classify(setting: Setting, scenes: list[Scene], classifier: ShapesClassifier) -> tuple[Tensor, Tensor]:
    """Classifier features [N, 128] and predictions [N, 8] of one picture per scene, from complete captions."""
    rng = np.random.default_rng(_SCENE_SEED)
    tokenizer, encoder = load_text()
    embeddings = embed_all(encoder, tokenize(tokenizer, [*(describe(scene, rng) for scene in scenes), ""]))
    embeddings = embeddings.float().to(device())
    unet, vae = load_unet(setting.unet).eval(), load_vae().eval()
    features, seen = [], []
    for start in range(0, len(scenes), _BATCH):
        wanted = embeddings[start : min(start + _BATCH, len(scenes))]
        noise = initial_noise(len(wanted), _NOISE_SEED + start).to(device())
        latents = euler(
            unet, noise, wanted, embeddings[-1:], steps=setting.steps, guidance_scale=setting.guidance_scale
        )
        feature, logits = classifier(decode(vae, latents))
        features.append(feature)
        seen.append(predictions(logits))
    return torch.cat(features), torch.cat(seen)


@torch.no_grad()
def measure(setting: Setting) -> dict[str, Any]:
    """All figures of one setting, over held-out scenes."""
    classifier = load_classifier()
    scenes = sample_scenes(setting.images, np.random.default_rng(_SCENE_SEED), held_out=True)
    wanted = torch.tensor([labels(scene) for scene in scenes], device=device())
    features, seen = generate_and_classify(setting, scenes, classifier)
    rng = np.random.default_rng(_SCENE_SEED + 1)
    real = [classifier(labelled_drawings(_BATCH, rng, held_out=True)[0])[0] for _ in range(0, setting.images, _BATCH)]
    distance = frechet_distance(features, torch.cat(real))
    return vars(setting) | attribute_accuracy(seen, wanted) | {"frechet": round(distance, 3)}


def decoder_figures() -> dict[str, float]:
    """PSNR of both decoders on held-out drawings, in dB."""
    vae = load_vae().eval()
    return {"vae_psnr_db": reconstruction_psnr_db(vae), "tiny_psnr_db": decoder_psnr_db(vae, load_tiny().eval())}


def report(setting: Setting, *, decoders: bool, json_file: Path | None) -> None:
    """Prints the figures of one setting and writes them where asked."""
    figures = measure(setting) | (decoder_figures() if decoders else {})
    print(json.dumps(figures, indent=2), flush=True)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


def run() -> None:
    """The last gate, at the recommended setting; also the card's contact sheet."""
    unet = load_unet().eval()
    write_samples(unet, MODEL_DIR / "samples.png", steps=RECOMMENDED_STEPS, guidance_scale=RECOMMENDED_GUIDANCE)
    figures = measure(Setting()) | decoder_figures()
    gate("evaluate", f"attribute accuracy at {RECOMMENDED_STEPS} steps", figures["accuracy"], GATE_ACCURACY)
    record_figures("evaluate", figures)
