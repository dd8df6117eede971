"""Stored log-likelihoods: which tokens they are sums over, and which model and settings they were scored with.

`larpo.score_lists` writes both as columns beside ref_logps. Columns survive JSON, parquet, pandas and every operation of
datasets, which metadata of a file or a schema do not, and rows of several files can be joined.

    num_tokens    for each candidate, how many tokens its log-likelihood is a sum over
    token_hashes  for each candidate, a hash of its prompt's tokens, its own, and which of them count
    scored_with   JSON text: the models' names and hashes of their weights, dtype, hashes of tokenizer and chat template, the
                  limits, and versions

Training accepts ref_logps only where the tokens agree; scored_with tells why they do not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

TOKEN_HASHES, SCORED_WITH = "token_hashes", "scored_with"


def counted_tokens(row: Mapping[str, Any]) -> list[int]:
    """How many tokens of each candidate of a tokenised row count: what its log-likelihood is a sum over."""
    return [sum(mask) for mask in row["completion_mask"]] if row.get("completion_mask") else [*map(len, row["completion_ids"])]


def token_hashes(row: Mapping[str, Any]) -> list[str]:
    """A hash of each candidate of a tokenised row, 16 characters: of the prompt's tokens, its own, and which of them count."""
    masks = row.get("completion_mask") or [[True] * len(ids) for ids in row["completion_ids"]]
    prompt = hashlib.sha256(_bytes(row["prompt_ids"]))
    found = []
    for ids, mask in zip(row["completion_ids"], masks, strict=True):
        digest = prompt.copy()
        digest.update(b"|" + _bytes(ids) + b"|" + bytes(map(bool, mask)))
        found.append(digest.hexdigest()[:16])  # 64 bits: no two of many million candidates are taken for one
    return found


def scored_with(
    tokenizer: PreTrainedTokenizerBase, limits: Mapping[str, Any], model: nn.Module, ref_model: nn.Module | None = None
) -> str:
    """The record of a scoring; limits: `larpo.data.limits.TokenLimits` as a dict."""
    import torch
    import transformers

    import larpo_kernels

    record = {"model": model_name(model), "weights": weights(model)}
    if ref_model is not None:
        record |= {"ref_model": model_name(ref_model), "ref_weights": weights(ref_model)}
    dtype = next((model if ref_model is None else ref_model).parameters()).dtype
    record |= {"dtype": str(dtype).removeprefix("torch.")} | _of_tokenizer(tokenizer) | dict(limits)
    versions = {package.__name__: package.__version__ for package in (larpo_kernels, torch, transformers)}
    return json.dumps(record | versions, default=str)


def weights(model: nn.Module) -> str | None:
    """A hash of all parameters and buffers of a model, in the dtype in which it holds them; None where they are elsewhere.

    A folder's name is not enough: a run that is resumed writes other weights into it.
    """
    import torch
    import xxhash  # as datasets has it; sha256 of a large model takes minutes on some machines

    digest = xxhash.xxh3_128()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()], key=itemgetter(0)):
        if tensor.is_meta or hasattr(tensor, "full_tensor"):
            return None
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return f"xxh3 {digest.hexdigest()[:16]}"


def model_name(model: nn.Module) -> str:
    """Name, or whole path of the folder, of a model; its class where it has none."""
    name = getattr(model, "name_or_path", "")
    if not name:
        return f"a {type(model).__name__} without a name"
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def reference(record: str | None) -> tuple[str | None, str | None]:
    """Name and weights of the model that ref_logps are of, by the record beside them."""
    found = {} if record is None else json.loads(record)
    names = ("ref_model", "ref_weights") if "ref_model" in found else ("model", "weights")
    return tuple(found.get(name) for name in names)


def check_scored_tokens(
    row: Mapping[str, Any], tokens: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, limits: Mapping[str, Any], where: str
) -> None:
    """Raises ValueError where ref_logps were scored for other tokens than the row has now.

    row: as it came, with what was written beside ref_logps, or without; tokens: as it is tokenised now.
    """
    if row.get("ref_logps") is None:
        return
    for i, (before, now) in enumerate(_pairs(row.get("num_tokens"), counted_tokens(tokens))):
        if before != now:
            changes = changes_since(row.get(SCORED_WITH), tokenizer, limits)
            raise ValueError(
                f"{where}: ref_logps is of {before} tokens for completions[{i}], of which {now} count now{changes}: score the "
                "lists with the max_length, max_prompt_length, truncation_mode and append_eos that they are trained with"
            )
    for i, (before, now) in enumerate(_pairs(row.get(TOKEN_HASHES), token_hashes(tokens))):
        if before != now:
            changes = changes_since(row.get(SCORED_WITH), tokenizer, limits)
            raise ValueError(
                f"{where}: ref_logps is of other tokens than completions[{i}] and its prompt have now{changes}: score the "
                "lists with the tokenizer, chat template and limits that they are trained with"
            )


def _pairs(before: Any, now: Sequence) -> list[tuple[Any, Any]]:
    """None where the data has other columns of that name."""
    return list(zip(before, now, strict=True)) if isinstance(before, list) and len(before) == len(now) else []


def changes_since(record: Any, tokenizer: PreTrainedTokenizerBase, limits: Mapping[str, Any]) -> str:
    """What has changed since log-likelihoods were written, in parentheses, as far as the record beside them tells."""
    if not isinstance(record, str):
        return ""
    before = json.loads(record)
    now = _of_tokenizer(tokenizer) | dict(limits)
    changed = [f"{name} was {before[name]!r} and is {x!r}" for name, x in now.items() if name in before and before[name] != x]
    return f" ({'; '.join(changed)})" if changed else ""


def _of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    words = sorted(tokenizer.get_vocab().items())
    template = getattr(tokenizer, "chat_template", None)
    return {
        "tokenizer": _hash(json.dumps([words, tokenizer.special_tokens_map], default=str)),
        "chat_template": None if template is None else _hash(json.dumps(template, sort_keys=True)),
    }


def _hash(text: str) -> str:
    return f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _bytes(ids: Sequence[int]) -> bytes:
    return ",".join(map(str, ids)).encode()
