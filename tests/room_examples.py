"""A small model of every room, so that the same tests hold all of them to the same rules.

A room adds a function here that builds its models on a tiny backbone; nothing else in the shared tests changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import toy
from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.modules import Pooling
from toy.modeling_toy import ToyHead, ToyHeadConfig, ToyModel, ToyPooling
from transformers import AutoTokenizer, MobileNetV2Config, MobileNetV2Model
from transformers.models.mobilenet_v2.image_processing_pil_mobilenet_v2 import MobileNetV2ImageProcessorPil

from polyrep.hub import Encoder
from polyrep.methods import (
    CheckedTransformer,
    Dense2SparseConfig,
    Dense2SparseForRetrieval,
    Dense2SparseForRetrievalConfig,
    Dense2SparseModel,
    Dense2SparsePooling,
    DualEncoderConfig,
    DualEncoderHeadConfig,
    DualEncoderModel,
    GaussianConfig,
    GaussianHeadConfig,
    GaussianModel,
    GaussianPooling,
    GaussianTransformer,
    LemurConfig,
    LemurModel,
    LemurPooling,
    MultiLayerConfig,
    MultiLayerHeadConfig,
    MultiLayerModel,
    MultiLayerPooling,
    ReinPoolConfig,
    ReinPoolModel,
    ReinPoolPooling,
)


@dataclass
class Example:
    """What the room tests need of a room.

    Attributes:
        models: Name -> sentence-transformers model of each kind of folder that the room makes.
        weight: Name of a weight of the room's own in the first model's root file, for the test that drops it.
        bad_config: (config class, arguments, word the error must contain) for each check of the config.
        symmetric: Queries and documents are encoded alike.
    """

    models: dict[str, Encoder]
    weight: str | None = None
    bad_config: list[tuple[type, dict[str, Any], str]] = field(default_factory=list)
    symmetric: bool = False


def one_folder(
    model: Any,
    backbone: Path,
    folder: Path,
    family: type[Encoder] = SentenceTransformer,
    transformer: type[Transformer] = Transformer,
) -> Any:
    """A room's model as a folder, opened by the stock Transformer: scored by the inner product, told its task."""
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(backbone).save_pretrained(folder)
    output = {"text": {"method": "forward", "method_output_name": "sentence_embedding"}}
    opened = transformer(
        str(folder), modality_config=output, module_output_name="sentence_embedding", unpad_inputs=False
    )
    whole = family(modules=[opened], similarity_fn_name="dot", device="cpu")
    whole.module_kwargs = {"0": ["task"]}
    return whole


def tiny_vision(folder: Path) -> Path:
    """A random MobileNetV2 for images of 32 pixels, with its processor."""
    torch.manual_seed(10)
    config = MobileNetV2Config(depth_multiplier=0.35, finegrained_output=False, image_size=32)
    model = MobileNetV2Model(config).eval()
    for module in model.modules():  # as drawn by default, so little comes through that all images look alike
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    model.save_pretrained(folder)
    square = {"height": 32, "width": 32}
    MobileNetV2ImageProcessorPil(size=square, do_center_crop=False).save_pretrained(folder)
    return folder


def image_text_folder(model: Any, processor: Any, folder: Path, family: type[Encoder], *kwargs: str) -> Any:
    """A model for images and texts as a folder, opened as its ``sentence_bert_config.json`` would have it."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    name = {"method_output_name": "sentence_embedding"}
    modalities = {"text": {"method": "forward", **name}, "image": {"method": "encode_image", **name}}
    opened = CheckedTransformer(
        str(folder), modality_config=modalities, module_output_name="sentence_embedding", unpad_inputs=False
    )
    whole = family(modules=[opened], similarity_fn_name="dot", device="cpu")
    whole.module_kwargs = {"0": ["task", *kwargs]}
    return whole


def dual_encoder(backbone: Path, scratch: Path, vision: Path | None = None) -> DualEncoderModel:
    """Text and vision encoder with random maps between them."""
    texts = SentenceTransformer(modules=[Transformer(str(backbone)), Pooling(32, "mean"), Normalize()], device="cpu")
    texts.save_pretrained(str(scratch / "texts"))
    vision = vision or tiny_vision(scratch / "vision")
    torch.manual_seed(9)
    model = DualEncoderModel.from_encoder(str(scratch / "texts"), vision=str(vision), projection_dim=12, hidden_dim=8)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def dual_encoder_example(backbone: Path, scratch: Path) -> Example:
    model = dual_encoder(backbone, scratch)
    processor = DualEncoderModel.load_processor(str(scratch / "texts"), str(scratch / "vision"))
    return Example(
        {"retriever": image_text_folder(model, processor, scratch / "dual", SentenceTransformer)},
        weight="head.text.linear.weight",
        bad_config=[
            (DualEncoderHeadConfig, {"text_dim": 0}, "text_dim=0"),
            (DualEncoderHeadConfig, {"hidden_dim": -1}, "hidden_dim=-1"),
            (DualEncoderHeadConfig, {"dropout": 1.0}, "dropout=1.0"),
            (DualEncoderConfig, {"encoder_config": {"model_type": "bert"}}, "'bert'.*clip, siglip, blip"),
            (DualEncoderConfig, {"text_config": {"model_type": "bert"}}, "text_config and vision_config"),
            (DualEncoderConfig, {"pooling": "max"}, "pooling='max'"),
        ],
        symmetric=True,
    )


def toy_example(backbone: Path, scratch: Path) -> Example:
    torch.manual_seed(3)
    retriever = ToyModel.from_encoder(backbone, projection_dim=6)
    head = ToyPooling(ToyHead(ToyHeadConfig(32, 6)))
    pipeline = SentenceTransformer(
        modules=[Transformer(str(backbone)), Pooling(32, "mean"), head], similarity_fn_name="dot", device="cpu"
    )
    return Example(
        {"retriever": one_folder(retriever, backbone, scratch / "toy-retriever"), "pipeline": pipeline},
        weight="head.task_bias",
        bad_config=[
            (ToyHeadConfig, {"projection_dim": 0}, "projection_dim=0"),
            (ToyHeadConfig, {"input_dim": "8"}, "input_dim='8'"),
        ],
    )


def dense2sparse_example(backbone: Path, scratch: Path) -> Example:
    torch.manual_seed(4)
    encoder = SentenceTransformer(modules=[Transformer(str(backbone)), Pooling(32, "mean"), Normalize()], device="cpu")
    head = Dense2SparseModel.from_backbone(encoder, query_top_k=20, document_top_k=30, average_length=5.0)
    with torch.no_grad():
        head.vocabulary.bias.normal_()
        head.own_weight.uniform_(0.5, 2)
    head.restrict_expansion(torch.arange(10, head.config.vocab_size))
    encoder.save_pretrained(str(scratch / "encoder"))
    retriever = Dense2SparseForRetrieval.from_encoder(str(scratch / "encoder"), head=head)
    towers = dual_encoder(backbone, scratch)
    towers.save_pretrained(scratch / "towers")
    processor = DualEncoderModel.load_processor(str(scratch / "texts"), str(scratch / "vision"))
    processor.save_pretrained(scratch / "towers")
    images = Dense2SparseForRetrieval.from_encoder(
        str(scratch / "towers"), query_top_k=20, document_top_k=30, average_length=5.0
    )
    return Example(
        {
            "retriever": one_folder(retriever, backbone, scratch / "dense2sparse-retriever", SparseEncoder),
            "images": image_text_folder(images, processor, scratch / "dense2sparse-images", SparseEncoder, "expand"),
            "pipeline": SparseEncoder(modules=[*encoder.children(), Dense2SparsePooling(head)], device="cpu"),
        },
        weight="head.own_weight",
        bad_config=[
            (Dense2SparseConfig, {"input_dim": 0}, "input_dim=0"),
            (Dense2SparseConfig, {"vocab_size": 10, "document_top_k": 11}, "document_top_k=11 of a vocabulary of 10"),
            (Dense2SparseConfig, {"query_top_k": 0}, "query_top_k=0"),
            (Dense2SparseConfig, {"mass": 1.5}, "mass=1.5"),
            (Dense2SparseConfig, {"min_weight": float("nan")}, "min_weight=nan"),
            (Dense2SparseConfig, {"activation": "relu"}, "log1p_relu, double_log1p"),
            (Dense2SparseConfig, {"expansion": "none", "own_tokens": None}, "every vector is empty"),
            (Dense2SparseConfig, {"expansion_size": 40_000}, "expansion_size=40000"),
            (Dense2SparseConfig, {"own_tokens": "learned", "foreign_words": True}, "taken for other words"),
            (Dense2SparseForRetrievalConfig, {"pooling": "max"}, "pooling='max'"),
            (
                Dense2SparseForRetrievalConfig,
                {"encoder_config": towers.config, "input_dim": 12, "expansion": "query"},
                "leaves images without a word",
            ),
            (
                Dense2SparseForRetrievalConfig,
                {"encoder_config": towers.config, "input_dim": 13},
                "the towers give vectors of 12, but input_dim=13",
            ),
        ],
    )


def reinpool_example(backbone: Path, scratch: Path) -> Example:
    torch.manual_seed(5)

    def modules() -> list[torch.nn.Module]:
        names = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
        narrow = Dense(32, 16, bias=False, activation_function=torch.nn.Identity(), **names)
        return [Transformer(str(backbone)), narrow, MultiVectorMask(), Normalize(**names)]

    def pooling(**config: Any) -> ReinPoolPooling:
        head = ReinPoolModel(ReinPoolConfig(dim=16, **config))
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        return ReinPoolPooling(head)

    many = pooling(pooling="kmeans", num_vectors=2, refinement=1, projection=True)
    one = pooling(output="sentence_embedding", weights="soft", projection=True)
    return Example(
        {
            "pipeline": MultiVectorEncoder(modules=[*modules(), many], device="cpu"),
            "single": SentenceTransformer(modules=[*modules(), one], device="cpu"),
        },
        bad_config=[
            (ReinPoolConfig, {"dim": 0}, "dim=0"),
            (ReinPoolConfig, {"dim": True}, "dim=True"),
            (ReinPoolConfig, {"num_layers": -1}, "num_layers=-1"),
            (ReinPoolConfig, {"num_heads": 7}, "num_heads=7 does not divide dim=128.*e.g. 4"),
            (ReinPoolConfig, {"ffn_mult": 0.5}, "ffn_mult=0.5"),
            (ReinPoolConfig, {"num_vectors": 0}, "num_vectors=0"),
            (ReinPoolConfig, {"num_vectors": 2}, "num_vectors=2. Use pooling='kmeans'"),
            (ReinPoolConfig, {"min_keep": 0}, "min_keep=0"),
            (ReinPoolConfig, {"refinement": "1"}, "refinement='1'"),
            (ReinPoolConfig, {"patch_columns": 0}, "patch_columns=0"),
            (ReinPoolConfig, {"dim": 6, "num_heads": 2, "patch_columns": 3}, "dim=6. Use None"),
            (ReinPoolConfig, {"output": "embedding"}, "token_embeddings, sentence_embedding"),
            (ReinPoolConfig, {"pooling": "max"}, "mean, kmeans, slots"),
            (ReinPoolConfig, {"weights": "both"}, "weights='both'.*hard, soft"),
            (ReinPoolConfig, {"quantization": "int8"}, "quantization='int8'.*none, binary"),
            (ReinPoolConfig, {"dropout": 1}, "dropout=1"),
            (ReinPoolConfig, {"threshold": 0.0}, "threshold=0.0"),
            (
                ReinPoolConfig,
                {"output": "sentence_embedding", "pooling": "kmeans", "num_vectors": 4},
                "is one vector, but num_vectors=4",
            ),
        ],
    )


def lemur_example(backbone: Path, scratch: Path) -> Example:
    torch.manual_seed(8)
    names = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    narrow = Dense(32, 16, bias=False, activation_function=torch.nn.Identity(), **names)
    head = LemurModel(LemurConfig(token_dim=16, latent_dim=24, num_anchors=40, rank=12, embedding_dim=10))
    with torch.no_grad():
        head.anchors.copy_(torch.nn.functional.normalize(torch.randn(40, 16), dim=-1))
        for map_ in (head.query_map, head.document_map):
            map_.normal_()
        head.document_mean.normal_()
    return Example(
        {
            "pipeline": SentenceTransformer(
                modules=[
                    Transformer(str(backbone)),
                    narrow,
                    MultiVectorMask(),
                    Normalize(**names),
                    LemurPooling(head),
                ],
                device="cpu",
            )
        },
        bad_config=[
            (LemurConfig, {"token_dim": 0}, "token_dim=0"),
            (LemurConfig, {"latent_dim": 2.0}, "latent_dim=2.0"),
            (LemurConfig, {"num_anchors": 0}, "num_anchors=0"),
            (LemurConfig, {"rank": -1}, "rank=-1"),
            (LemurConfig, {"latent_dim": 100, "rank": 200}, "rank=200 directions of a space of latent_dim=100"),
            (LemurConfig, {"rank": 64, "embedding_dim": 65}, "only rank=64 directions are kept. Use up to 64"),
            (LemurConfig, {"feature_type": "cnn"}, "feature_type='cnn'.*mlp, elm"),
            (LemurConfig, {"query_scale": 0.0}, "query_scale=0.0"),
            (LemurConfig, {"ridge": -1.0}, "ridge=-1.0"),
            (LemurConfig, {"seed": None}, "seed=None"),
        ],
    )


def multilayer_example(backbone: Path, scratch: Path) -> Example:
    torch.manual_seed(6)

    def stirred(model: torch.nn.Module) -> Any:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return model

    retriever = stirred(MultiLayerModel.from_encoder(str(backbone), layers=[-1, 0], pooling="scalar_mix", tied=False))
    mixed = MultiLayerPooling(layers=[-1, 0, 1], pooling="scalar_mix", normalize=True)
    several = MultiLayerPooling(layers=[-1, 1], pooling="multi", projection=True, hidden_size=32)
    return Example(
        {
            "retriever": one_folder(retriever, backbone, scratch / "multilayer-retriever"),
            "pipeline": SentenceTransformer(modules=[Transformer(str(backbone)), stirred(mixed)], device="cpu"),
            "multi": MultiVectorEncoder(modules=[Transformer(str(backbone)), stirred(several)], device="cpu"),
        },
        weight="query_encoder.encoder.layer.0.output.dense.weight",
        bad_config=[
            (MultiLayerHeadConfig, {"layers": []}, r"layers=\[\] names no hidden states"),
            (MultiLayerHeadConfig, {"layers": "-1,-3"}, "Use whole numbers"),
            (MultiLayerHeadConfig, {"layers": [-1, True]}, "Use whole numbers"),
            (MultiLayerHeadConfig, {"layers": [-1, -1]}, "names a layer twice"),
            (MultiLayerHeadConfig, {"layers": [-1, 12], "num_hidden_layers": 12}, r"0 to 12 they are \[12, 12\]"),
            (
                MultiLayerConfig,
                {"layers": [-1, 13]},
                r"names 13, .* 12 layers.* 0 \(embeddings\) to 12 .*-13 to -1",
            ),
            (MultiLayerConfig, {"layers": [-1, -14]}, "names -14"),
            (MultiLayerConfig, {"pooling": "multi"}, "MultiVectorEncoder"),
            (MultiLayerHeadConfig, {"pooling": "max"}, "self_contrastive, last, mean, scalar_mix, linear, multi"),
            (MultiLayerHeadConfig, {"token": "max"}, "token='max'.*mean, cls"),
            (MultiLayerHeadConfig, {"layers": [-1], "pooling": "mean"}, "nothing to pool"),
            (MultiLayerHeadConfig, {"pool_queries": True}, "would change nothing"),
            (MultiLayerHeadConfig, {"pooling": "linear", "projection": True}, "one map behind another"),
        ],
    )


def gaussian_example(backbone: Path, scratch: Path) -> Example:
    torch.manual_seed(7)

    def stirred(model: torch.nn.Module, *names: str) -> Any:
        with torch.no_grad():
            for name in names:
                model.get_parameter(name).add_(torch.randn_like(model.get_parameter(name)) * 0.3)
        return model

    retriever = GaussianModel.from_encoder(str(backbone), mean_dim=12, variance_groups=3)
    retriever = stirred(retriever, "head.variance_map", "var_embedding")
    pooling = stirred(GaussianPooling(input_dim=32, mean_dim=15), "model.mean_map", "model.variance_map")
    modules = [Transformer(str(backbone)), Pooling(32, "mean"), pooling]
    folder = scratch / "gaussian-retriever"
    return Example(
        {
            "retriever": one_folder(retriever, backbone, folder, transformer=GaussianTransformer),
            "pipeline": SentenceTransformer(modules=modules, device="cpu"),
        },
        weight="encoder.encoder.layer.0.output.dense.weight",
        bad_config=[
            (GaussianHeadConfig, {"mean_dim": 0}, "mean_dim=0"),
            (GaussianHeadConfig, {"variance_groups": 1.5}, "variance_groups=1.5"),
            (GaussianHeadConfig, {"variance_floor": 0.0}, "variance_floor=0.0.*more than 0"),
            (GaussianHeadConfig, {"beta": -1.0}, "beta=-1.0"),
            (GaussianHeadConfig, {"divergence": "js"}, "kl, reverse_kl, likelihood, w2, csd, dot"),
            (GaussianHeadConfig, {"projection_dim": 384}, r"2 k \+ 1. Use 383 .mean_dim=191. or 385 .mean_dim=192."),
            (
                GaussianHeadConfig,
                {"projection_dim": 384, "variance_groups": 16},
                r"k \+ 16 \+ 1. Use 369 .mean_dim=352",
            ),
            (GaussianHeadConfig, {"projection_dim": 2}, "Use 3 .mean_dim=1."),
            (GaussianHeadConfig, {"mean_dim": 9, "projection_dim": 20}, "= 19 dimensions, not projection_dim=20"),
            (GaussianHeadConfig, {"mean_dim": 385}, "mean_dim=385 of input_dim=384"),
            (GaussianHeadConfig, {"mean_dim": 100, "variance_groups": 16}, "does not divide.*mean_dim=96"),
            (GaussianConfig, {"mean_from": "max"}, "mean_from='max'.*mean, cls"),
            (GaussianConfig, {"variance_from": "max"}, "var_token, mean, cls"),
        ],
    )


EXAMPLES: dict[str, Callable[[Path, Path], Example]] = {
    toy.ToyModel.config_class.model_type: toy_example,
    Dense2SparseForRetrievalConfig.model_type: dense2sparse_example,
    DualEncoderConfig.model_type: dual_encoder_example,
    GaussianConfig.model_type: gaussian_example,
    LemurConfig.model_type: lemur_example,
    MultiLayerConfig.model_type: multilayer_example,
    ReinPoolConfig.model_type: reinpool_example,
}
