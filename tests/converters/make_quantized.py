"""Makes `quantized/*.safetensors`: small modules as other packages quantize them, and the weights that those make of them.

    python -m tests.converters.make_quantized FOLDER-OF-AUTO-GPTQ FOLDER-OF-AUTOAWQ

Needs torch, compressed-tensors and bitsandbytes, and the unpacked packages auto-gptq 0.7.1 and autoawq 0.2.9, of which two
modules are taken (their own imports need older versions of transformers).
"""

import importlib
import json
import sys
import types
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file

OUT = Path(__file__).parent / "quantized"
N_ROWS, N_COLUMNS, SIZE = 32, 96, 32


def save(name, settings, module, weights):
    tensors = {f"m.{key}": value.contiguous() for key, value in module.items()} | {"expected": weights.float().contiguous()}
    save_file(tensors, OUT / f"{name}.safetensors", {"settings": json.dumps(settings)})


def weights(n_rows=N_ROWS):
    return torch.randn(n_rows, N_COLUMNS, generator=torch.Generator().manual_seed(1)) * 0.1


def package(name, folder):
    """A package whose own __init__ isn't run."""
    module = types.ModuleType(name)
    module.__path__ = [str(folder)]
    sys.modules[name] = module


def ranges(x, n_bits):
    """Scales and zero points of groups, (n_rows, n_groups)."""
    groups = x.reshape(len(x), -1, SIZE)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low) / (2**n_bits - 1)).half().float()
    return scales, torch.round(-low / scales).clamp(1, 2**n_bits - 1)


def gptq(folder):
    package("auto_gptq", folder / "auto_gptq")
    package("auto_gptq.nn_modules", folder / "auto_gptq/nn_modules")
    package("auto_gptq.nn_modules.qlinear", folder / "auto_gptq/nn_modules/qlinear")
    linear = importlib.import_module("auto_gptq.nn_modules.qlinear.qlinear_cuda").QuantLinear
    for n_bits in (2, 4, 8):
        for acts in (False, True):
            x = weights()
            # The columns of a group: one after the other, or anywhere.
            order = (
                torch.randperm(N_COLUMNS, generator=torch.Generator().manual_seed(2)) if acts else torch.arange(N_COLUMNS)
            )
            index = torch.empty(N_COLUMNS, dtype=torch.int32)
            index[order] = torch.arange(N_COLUMNS, dtype=torch.int32) // SIZE
            scales, zeros = ranges(x[:, order], n_bits)
            module = linear(n_bits, SIZE, N_COLUMNS, N_ROWS, bias=False, weight_dtype=torch.float16)
            float_module = torch.nn.Linear(N_COLUMNS, N_ROWS, bias=False)
            float_module.weight.data = x
            module.pack(float_module, scales, zeros.clone(), index)
            module.scales = module.scales.half()
            state = {k: v.clone() for k, v in module.state_dict().items()}
            module.scales = module.scales.float()
            made = module(torch.eye(N_COLUMNS)).T
            settings = {"quant_method": "gptq", "bits": n_bits, "group_size": SIZE, "desc_act": acts, "sym": False}
            save(f"gptq-{n_bits}{'-act' if acts else ''}", settings, state, made)


def awq(folder):
    package("awq", folder / "awq")
    package("awq.utils", folder / "awq/utils")
    dequantize = importlib.import_module("awq.utils.packing_utils").dequantize_gemm
    random = torch.Generator().manual_seed(3)
    state = {
        "qweight": torch.randint(-(2**31), 2**31, (N_COLUMNS, N_ROWS // 8), generator=random).int(),
        "qzeros": torch.randint(-(2**31), 2**31, (N_COLUMNS // SIZE, N_ROWS // 8), generator=random).int(),
        "scales": (torch.rand(N_COLUMNS // SIZE, N_ROWS, generator=random) * 0.01).half(),
    }
    made = dequantize(state["qweight"], state["qzeros"], state["scales"].float(), 4, SIZE)
    settings = {"quant_method": "awq", "bits": 4, "group_size": SIZE, "version": "gemm", "zero_point": True}
    save("awq", settings, state, made.T)


def compressed():
    cases = {
        "ct-packed-4": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": SIZE}),
        "ct-packed-4-asymmetric": (
            "pack-quantized",
            {"num_bits": 4, "strategy": "group", "group_size": SIZE, "symmetric": False},
        ),
        "ct-packed-3": ("pack-quantized", {"num_bits": 3, "strategy": "channel"}),
        "ct-packed-8": ("pack-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
        "ct-int-8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
        "ct-int-8-tensor": ("int-quantized", {"num_bits": 8, "strategy": "tensor", "symmetric": False}),
        "ct-int-8-group": ("int-quantized", {"num_bits": 8, "strategy": "group", "group_size": SIZE, "symmetric": False}),
        "ct-float-8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        "ct-float-8-block": (
            "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 48]},
        ),
        "ct-nvfp4": (
            "nvfp4-pack-quantized",
            {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
        ),
        "ct-mxfp4": ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}),
    }
    for name, (form, values) in cases.items():
        args = QuantizationArgs(**values)
        scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
        x = weights()
        if args.strategy == "block":
            parts = x.reshape(2, 16, 2, 48)
            low, high = parts.amin((1, 3)), parts.amax((1, 3))
        elif args.strategy == "tensor":
            low, high = x.min().reshape(1), x.max().reshape(1)
        else:
            groups = x.reshape(N_ROWS, -1, args.group_size or N_COLUMNS)
            low, high = groups.amin(-1), groups.amax(-1)
        whole = torch.tensor([448 * 6 / x.abs().max()]) if form.startswith("nvfp4") else None
        scales, zeros = calculate_qparams(low, high, args, global_scale=whole)
        if form.startswith("mxfp4"):
            scales = 2.0 ** torch.floor(torch.log2(scales))
        state = {"weight": x, "weight_scale": scales}
        if not args.symmetric:
            state["weight_zero_point"] = zeros.to(torch.int8)
        if whole is not None:
            state["weight_global_scale"] = whole
        compressor = BaseCompressor.get_value_from_registry(form)
        packed = compressor.compress(state, scheme)
        made = compressor.decompress(packed, scheme)["weight"]
        group = {"targets": ["Linear"], "weights": json.loads(args.model_dump_json())}
        settings = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
        save(name, settings, packed, made)


def bits_and_bytes():
    x = weights(30)
    for kind in ("nf4", "fp4"):
        for twice in (False, True):
            packed, state = bnb.quantize_4bit(x, blocksize=64, compress_statistics=twice, quant_type=kind)
            parts = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
            made = bnb.dequantize_4bit(packed, state)
            settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
            save(f"bnb-{kind}{'-twice' if twice else ''}", settings, {"weight": packed, **parts}, made)
    quants, stats, _ = bnb.int8_vectorwise_quant(x.half())
    made = bnb.int8_vectorwise_dequant(quants, stats)
    state = {"weight": quants, "SCB": stats, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    save("bnb-int8", {"quant_method": "bitsandbytes", "load_in_8bit": True}, state, made)


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    gptq(Path(sys.argv[1]))
    awq(Path(sys.argv[2]))
    compressed()
    bits_and_bytes()
