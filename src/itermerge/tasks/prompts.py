"""What a model is asked: a question in one of a few formats, worked examples before it.

    qa       Question: A baker had 20 rolls and sold 8 of them. How many rolls are left?
             Answer: The baker sold 8 of 20 rolls, so 20 - 8 = 12 are left. The answer is 12.

             Question: ...
             Answer:
    alpaca   Below is an instruction that describes a task. Write a response that appropriately completes the request.

             ### Instruction:
             ...

             ### Response:
    chat     messages of a user and an assistant, put into the tokenizer's own chat template where one is at hand
    a text   of the user's own, with {question}, {shots} and {instruction} in it

alpaca is the template of Stanford Alpaca's instructions without input, which the code of 2503.02103 trains and
evaluates with, zero-shot; its worked examples stand within the instruction [choice].
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

FORMATS = ("qa", "alpaca", "chat")
CHAT = "<|messages|>"  # a prompt that begins with it is a list of messages, as JSON
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:"
)
_FIELD = re.compile(r"\{(question|shots|instruction)\}")
# Where a model begins the next question by itself. Not "###": it stands in GSM8K's "#### 72".
_STOP = {"qa": ("\nQuestion:",), "alpaca": ("Question:", "Instruction:", "Response:"), "chat": ()}

Shot = tuple[str, str]  # a question, and its worked solution


def render(template: str, question: str, shots: Sequence[Shot] = (), instruction: str = "") -> str:
    """The prompt. `instruction` comes first, as a paragraph or (chat) as the system message."""
    if template == "chat":
        turns = [("user", q, "assistant", a) for q, a in shots]
        messages = [{"role": "system", "content": instruction}] if instruction else []
        for turn in turns:
            messages += [{"role": turn[0], "content": turn[1]}, {"role": turn[2], "content": turn[3]}]
        return CHAT + json.dumps([*messages, {"role": "user", "content": question}], ensure_ascii=False)
    examples = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in shots)
    head = f"{instruction}\n\n" if instruction else ""
    if template == "qa":
        return f"{head}{examples}Question: {question}\nAnswer:"
    if template == "alpaca":
        return _ALPACA.format(f"{head}{examples}Question: {question}" if shots else f"{head}{question}")
    fields = {"question": question, "shots": examples, "instruction": instruction}
    return _FIELD.sub(lambda m: fields[m[1]], template)  # in one pass: a question may hold braces


def lead(template: str) -> str:
    """What stands between a prompt and a completion that we write."""
    return " " if template in ("qa", "alpaca") else ""


def stop_strings(templates: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(s for template in templates for s in _STOP.get(template, ())))


def problem_of(template: str, shots: int, instruction: str) -> str | None:
    """Why a template cannot be used with these, or None."""
    if template in FORMATS:
        return None
    fields = {m[1] for m in _FIELD.finditer(template)}
    if "question" not in fields:
        return f"{template!r} is none of {', '.join(FORMATS)}, and no text with {{question}} in it"
    if shots and "shots" not in fields:
        return f"{template!r} has no {{shots}}, and {shots} are asked for"
    if instruction and "instruction" not in fields:
        return f"{template!r} has no {{instruction}}, and there is one"
    return None


def messages_of(prompt: str) -> list[dict[str, str]] | None:
    """The messages of a chat prompt; None for a plain text."""
    return json.loads(prompt.removeprefix(CHAT)) if prompt.startswith(CHAT) else None
