"""What each template of dtrain writes, said a second time in plain Python, with whose words each piece is.

A piece is a text and the index of the message whose content, calls or end of turn it is; None for what is the template's.
"""

from __future__ import annotations

import json

BOS, EOS = "<|begin_of_text|>", "<|eos|>"


def calls_of(message):
    return [call["function"] for call in message.get("tool_calls") or []]


def dumps(value):
    return json.dumps(value, ensure_ascii=False)


def chatml(messages, tools=None):
    yield BOS, None
    for i, message in enumerate(messages):
        yield f"<|im_start|>{message['role']}\n", None
        yield f"{message['content']}<|im_end|>", i
        yield "\n", None


def qwen(messages, tools=None):
    roles = [message["role"] for message in messages]
    if tools:
        yield "<|im_start|>system\n", None
        if roles[0] == "system":
            yield messages[0]["content"], 0
            yield "\n\n", None
        listed = "".join(f"{dumps(tool)}\n" for tool in tools)
        yield f"Functions that can be called, one on each line:\n<tools>\n{listed}</tools>\n\n", None
        yield "A call is a JSON object between these tags:\n<tool_call>\n", None
        yield '{"name": "...", "arguments": {...}}\n</tool_call><|im_end|>\n', None
    for i, message in enumerate(messages):
        content = message.get("content") or ""
        if message["role"] == "assistant":
            calls = [f'<tool_call>\n{{"name": {dumps(call["name"])}, "arguments": {dumps(call["arguments"])}}}\n</tool_call>'
                     for call in calls_of(message)]  # fmt: skip
            yield "<|im_start|>assistant\n", None
            if message.get("reasoning_content"):
                yield f"<think>\n{message['reasoning_content']}\n</think>\n\n", i
            yield "\n".join([*([content] if content or not calls else []), *calls]) + "<|im_end|>", i
            yield "\n", None
        elif message["role"] == "tool":
            if i == 0 or roles[i - 1] != "tool":
                yield "<|im_start|>user", None
            yield "\n<tool_response>\n", None
            yield content, i
            yield "\n</tool_response>", None
            if roles[i + 1 : i + 2] != ["tool"]:
                yield "<|im_end|>\n", None
        elif not (tools and i == 0 and message["role"] == "system"):
            yield f"<|im_start|>{message['role']}\n", None
            yield f"{content}<|im_end|>", i
            yield "\n", None


def llama3(messages, tools=None):
    yield BOS, None
    if tools:
        yield "<|start_header_id|>system<|end_header_id|>\n\n", None
        if messages[0]["role"] == "system":
            yield messages[0]["content"].strip(), 0
            yield "\n\n", None
        yield (
            'These functions can be called. A call is a JSON object with "name" and "parameters", alone on its line.\n',
            None,
        )
        yield "".join(f"\n{dumps(tool)}" for tool in tools), None
        yield "<|eot_id|>", None
    for i, message in enumerate(messages):
        content = (message.get("content") or "").strip()
        if message["role"] == "system" and tools and i == 0:
            continue
        role = "ipython" if message["role"] == "tool" else message["role"]
        calls = [
            f'{{"name": {dumps(call["name"])}, "parameters": {dumps(call["arguments"])}}}' for call in calls_of(message)
        ]
        yield f"<|start_header_id|>{role}<|end_header_id|>\n\n", None
        yield "\n".join([*([content] if content or not calls else []), *calls]) + "<|eot_id|>", i


def mistral(messages, tools=None):
    yield BOS, None
    if tools:
        yield f"[AVAILABLE_TOOLS] {dumps(tools)}[/AVAILABLE_TOOLS]", None
    for i, message in enumerate(messages):
        content = message.get("content") or ""
        if message["role"] == "system":
            yield "[INST] ", None
            yield content, i
            yield "\n\n", None
        elif message["role"] == "user":
            if i == 0 or messages[i - 1]["role"] != "system":
                yield "[INST] ", None
            yield content, i
            yield "[/INST]", None
        elif message["role"] == "assistant":
            calls = [{"name": call["name"], "arguments": call["arguments"]} for call in calls_of(message)]
            if content or not calls:
                yield f" {content}", i
            if calls:
                yield f"[TOOL_CALLS] {dumps(calls)}", i
            yield EOS, i
        else:
            yield "[TOOL_RESULTS] ", None
            yield content, i
            yield "[/TOOL_RESULTS]", None


def gemma(messages, tools=None):
    yield BOS, None
    for i, message in enumerate(messages):
        content = message["content"].strip()
        if message["role"] == "system":
            yield "<start_of_turn>user\n", None
            yield content, i
            yield "\n\n", None
            continue
        if message["role"] == "assistant":
            yield "<start_of_turn>model\n", None
        elif i == 0 or messages[i - 1]["role"] != "system":
            yield "<start_of_turn>user\n", None
        yield f"{content}<end_of_turn>", i
        yield "\n", None


def alpaca(messages, tools=None):
    yield BOS, None
    for i, message in enumerate(messages):
        if message["role"] != "system":
            yield {"user": "### Instruction:\n", "assistant": "### Response:\n"}[message["role"]], None
        yield message["content"] + (EOS if message["role"] == "assistant" else ""), i
        yield "\n\n", None


def plain(messages, tools=None):
    yield BOS, None
    for i, message in enumerate(messages):
        yield f"{message['role'].capitalize()}:", None
        if message["role"] == "assistant":
            yield f" {message['content']}{EOS}", i
        else:
            yield " ", None
            yield message["content"], i
        yield "\n", None


PROMPTS = {
    "chatml": "<|im_start|>assistant\n", "qwen": "<|im_start|>assistant\n", "mistral": "", "gemma": "<start_of_turn>model\n",
    "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n", "alpaca": "### Response:\n", "plain": "Assistant:",
}  # fmt: skip
"""What stands at the end where the assistant is to go on."""
WRITERS = {
    "chatml": chatml,
    "qwen": qwen,
    "llama3": llama3,
    "mistral": mistral,
    "gemma": gemma,
    "alpaca": alpaca,
    "plain": plain,
}
WITH_TOOLS, WITH_REASONING = {"qwen", "llama3", "mistral"}, {"qwen"}
