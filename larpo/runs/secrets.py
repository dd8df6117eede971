"""Settings that must not be seen: tokens, keys and passwords, in whatever a run writes, prints or compares.

What is secret is told by a setting's name (`hub_token`, `api_key`, `Authorization`, ...), at any depth, and inside a text by
its form: `user:password@` and `?token=` in an address, `Bearer ...`, a token of the Hugging Face hub, `"token": "..."` in JSON,
`--api-key ...` in a command.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

MASK = "***"

# A `token` is a secret unless it is one of a vocabulary: eos_token, image_token, forced_bos_token.
_NAMES = re.compile(
    r"passw(or)?d|passphrase|secret|authorization|credential|cookie|bearer"
    r"|(api|access|private|signing|auth|encryption|account|subscription)_?key$"
    r"|(^|_)(hub|auth|access|api|hf|hugging_?face|wandb|refresh|session|security|user|id|git(hub|lab)?)_?token$|^token$"
)
_FORMS = (
    (re.compile(r"(?<=://)[^/\s@'\"]+(?=@)"), MASK),  # user:password@ and token@ in an address
    (re.compile(r"(?i)\b(bearer|basic)\s+(?=\S*\d)[\w.~+/=-]{8,}"), rf"\1 {MASK}"),
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), MASK),
)
_PAIR = re.compile(  # token=x in an address, "token": "x" in JSON; whether the name is one of a secret, is_secret knows
    r"(?i)((?:[a-z][\w-]*)?(?:token|key|passw|secret|credential|cookie|authorization)\w*)"
    r"([\"']?\s*[=:]\s*[\"']?)((?:(?:bearer|basic)\s+)?[^\s\"'&,;}\]]+)"
)
_FLAG = re.compile(r"(?<!\S)(--?)([A-Za-z][\w-]*)(\s+[\"']?)(?![-$\"'])([^\s\"']+)")  # --api-key x in a command; $KEY is none
_MASKED = re.compile(
    r"^\*{3}$|://\*{3}@|[=:]\s*[\"']?\*{3}|(bearer|basic) \*{3}|(^|\s)--?[a-z][\w-]*\s+[\"']?\*{3}", re.IGNORECASE
)
_IN_ENVIRONMENT = {"token", "hub_token", "hf_token", "use_auth_token"}  # what huggingface_hub finds for itself in HF_TOKEN


def is_secret(name: str) -> bool:
    """Whether a setting of this name is never shown.

    >>> [is_secret(name) for name in ("hub_token", "token", "apiKey", "X-Api-Key", "client_secret")]
    [True, True, True, True, True]
    >>> [is_secret(name) for name in ("eos_token", "max_new_tokens", "tokenizer", "key", "pad_token_id")]
    [False, False, False, False, False]
    """
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[-\s]", "_", str(name)).lower()
    return _NAMES.search(words) is not None


def masked(value: Any, name: str = "") -> Any:
    """The value of a setting with MASK in place of whatever is secret in it, at any depth; the value itself is not changed.

    >>> masked({"dtype": "bfloat16", "token": "hf_x", "headers": {"Authorization": "Bearer x"}, "eos_token": "</s>"})
    {'dtype': 'bfloat16', 'token': '***', 'headers': {'Authorization': '***'}, 'eos_token': '</s>'}
    >>> masked("https://me:word@host/data.jsonl?token=abc&page=2")
    'https://***@host/data.jsonl?token=***&page=2'
    """
    if value is None or isinstance(value, bool):  # says whether there is one
        return value
    if is_secret(name):
        return MASK
    if isinstance(value, Mapping):
        return {key: masked(item, key) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [masked(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return _masked_text(value) if isinstance(value, str) else value


def without_secrets(value: Any) -> Any:
    """As `masked`, with secret settings left out: what two runs are compared by.

    >>> without_secrets({"token": "hf_x", "dtype": "bfloat16"}) == without_secrets({"dtype": "bfloat16"})
    True
    """
    if isinstance(value, Mapping):
        return {key: without_secrets(item) for key, item in value.items() if not is_secret(key) or isinstance(item, bool)}
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    return _masked_text(value) if isinstance(value, str) else value


def given_again(settings: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """Settings that may have been read from a file in which secrets are masked. A masked token of the Hugging Face hub is left
    out where the environment has HF_TOKEN, since it is found there.

    Raises ValueError for any other masked secret: the mask must not be used in its place.

    >>> given_again({"sampler_options": {"api_key": "***"}})
    Traceback (most recent call last):
    ...
    ValueError: sampler_options.api_key is '***', which stands for a secret that was not written down: give the secret itself
    """
    found = {}
    for name, value in settings.items():
        where = f"{place}{name}"
        if isinstance(value, Mapping):
            value = given_again(value, f"{where}.")
        elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            value = [given_again(item, f"{where}.") if isinstance(item, Mapping) else item for item in value]
        elif isinstance(value, str) and _MASKED.search(value):
            of_the_hub = name in _IN_ENVIRONMENT
            if of_the_hub and os.environ.get("HF_TOKEN"):
                continue
            advice = ", or leave it out and set HF_TOKEN" if of_the_hub else ""
            raise ValueError(
                f"{where} is {value!r}, which stands for a secret that was not written down: give the secret itself{advice}"
            )
        found[name] = value
    return found


def _masked_text(text: str) -> str:
    for form, instead in _FORMS:
        text = form.sub(instead, text)
    text = _FLAG.sub(lambda flag: f"{flag[1]}{flag[2]}{flag[3]}{MASK}" if is_secret(flag[2]) else flag[0], text)
    return _PAIR.sub(lambda pair: f"{pair[1]}{pair[2]}{MASK}" if is_secret(pair[1]) else pair[0], text)
