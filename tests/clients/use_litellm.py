"""What a user of litellm does, against the server at argv[1]; prints one JSON object.

Runs in the environment that scripts/clients makes, not in weft's own.
"""

import json
import os
import sys
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # no download of a price list

import litellm


def main(url: str, model: str) -> dict[str, Any]:
    common: dict[str, Any] = {
        "model": f"openai/{model}",
        "api_base": f"{url}/v1",
        "api_key": "none",
        "temperature": 0,
        "seed": 1,
    }
    messages = [{"role": "user", "content": "Shall we to the Capitol?"}]
    whole = litellm.completion(messages=messages, max_tokens=12, **common)
    stream = litellm.completion(messages=messages, max_tokens=12, stream=True, **common)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    text = litellm.text_completion(prompt="First Citizen:", max_tokens=8, **common)
    vector = litellm.embedding(
        input=["What, ho!"], model=common["model"], api_base=common["api_base"], api_key="none"
    )
    shaped = litellm.completion(
        messages=messages,
        max_tokens=400,  # a small model may fill up with as many blanks as JSON has room for
        response_format={
            "type": "json_schema",
            "json_schema": {
                "name": "answer",
                "schema": {
                    "type": "object",
                    "properties": {"yes": {"type": "boolean"}},
                    "required": ["yes"],
                    "additionalProperties": False,
                },
            },
        },
        **common,
    )
    try:
        litellm.completion(messages=messages, num_retries=0, **{**common, "model": "openai/nobody"})
        error = "none"
    except litellm.NotFoundError as problem:
        error = f"{problem.status_code}"
    return {
        "text": whole.choices[0].message.content,
        "streamed": "".join(pieces),
        "usage": whole.usage.completion_tokens,
        "completion": text.choices[0].text,
        "dimensions": len(vector.data[0]["embedding"]),
        "shaped": json.loads(shaped.choices[0].message.content),
        "error": error,
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2])))
