"""What /openapi.json says of bodies and answers that are read and written by hand."""

from typing import Any


DESCRIPTION = """Actions of a vision-language-action policy.

`POST /act` takes the messages of published OpenVLA and OpenVLA-OFT clients as they are, and pictures as JPEG or PNG.
The websocket at `/` speaks openpi's protocol. Where the server has a token, send `Authorization: Bearer TOKEN`."""

_GRAY = (  # a gray PNG, 8 by 8
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAAEElEQVR42mNsYIAAJgaKGAAmCACQtTEKkQAAAABJRU5ErkJggg=="
)
_PLAIN = {
    "type": "array",
    "items": {"type": "array", "items": {"type": "number"}},
    "description": "(K, D), in the units of the dataset",
}
_ARRAY = {
    "type": "object",
    "description": "An array as json_numpy writes it",
    "required": ["__numpy__", "dtype", "shape"],
    "properties": {
        "__numpy__": {"type": "string", "contentEncoding": "base64"},
        "dtype": {"type": "string", "examples": ["|u1"]},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": 4},
    },
}
_PICTURE = {"anyOf": [_ARRAY, {"type": "string", "description": "JPEG or PNG in base64", "contentEncoding": "base64"}]}
_STATE = {"anyOf": [_ARRAY, {"type": "array", "items": {"type": "number"}}]}
_OPTIONS = {
    "unnorm_key": {"type": "string", "description": "Dataset whose statistics scale the action"},
    "session_id": {"type": "string", "description": "Of the observations of a session only the newest waits"},
    "uncertainty": {"type": "boolean", "description": "Answer with the entropy of each number, too"},
}
_OBSERVATION = {
    "type": "object",
    "anyOf": [{"required": ["image", "instruction"]}, {"required": ["full_image", "instruction"]}],
    "properties": {
        "image": _PICTURE,
        "full_image": _PICTURE,
        "wrist_image": _PICTURE,
        "instruction": {"type": "string", "minLength": 1, "maxLength": 1000},
        "state": _STATE,
        **_OPTIONS,
    },
}
_ENCODED = {
    "type": "object",
    "required": ["encoded"],
    "additionalProperties": False,
    "properties": {"encoded": {"type": "string", "description": "An observation as a JSON text"}},
}
_FORM = {
    "type": "object",
    "required": ["image", "instruction"],
    "properties": {
        "image": {"type": "string", "format": "binary"},
        "wrist_image": {"type": "string", "format": "binary"},
        "instruction": {"type": "string"},
        "state": {"type": "string", "description": "A JSON list of numbers"},
        **_OPTIONS,
    },
}
_PLAIN_ANSWER = {
    "type": "object",
    "required": ["actions", "timing_ms", "batch_size"],
    "properties": {
        "actions": _PLAIN,
        "entropy": {"anyOf": [_PLAIN, {"type": "null"}]},
        "timing_ms": {"type": "object", "additionalProperties": {"type": "number"}},
        "batch_size": {"type": "integer"},
    },
}
_INSTRUCTION = "pick up the red cube"

ACT_REQUEST: dict[str, Any] = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {"anyOf": [_OBSERVATION, _ENCODED]},
            "examples": {
                "picture": {"value": {"image": _GRAY, "instruction": _INSTRUCTION}},
                "json_numpy": {
                    "value": {
                        "image": {"__numpy__": "gICA" * 64, "dtype": "|u1", "shape": [8, 8, 3]},
                        "instruction": _INSTRUCTION,
                    }
                },
                "encoded": {"value": {"encoded": f'{{"image": "{_GRAY}", "instruction": "{_INSTRUCTION}"}}'}},
            },
        },
        "multipart/form-data": {"schema": _FORM},
    },
}


def _failures(**messages: str) -> dict[int | str, dict[str, Any]]:
    """Responses by status, such as `_422`."""
    content = {
        "application/json": {
            "schema": {"type": "object", "required": ["detail"], "properties": {"detail": {"type": "string"}}}
        }
    }
    return {int(name[1:]): {"description": text, "content": content} for name, text in messages.items()}


_GUARDED = _failures(
    _401="The token is missing or wrong",
    _403="Asked for by a wrong name, or by a page of another origin",
    _408="The body did not arrive in time",
    _413="The body is too large",
)
ACT_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "For pictures in base64 and forms, an object; for arrays, what the published servers answer: "
        "an array, to `full_image` a list of arrays, to `encoded` the same as a JSON text in a string",
        "content": {
            "application/json": {
                "schema": {"anyOf": [_PLAIN_ANSWER, _ARRAY, {"type": "array", "items": _ARRAY}, {"type": "string"}]}
            }
        },
    },
    **_GUARDED,
    **_failures(
        _400="The body is not what its content type says",
        _409="A newer observation of the same session has come",
        _415="Another content type",
        _422="Something in the observation is missing or wrong",
        _429="Too many observations are waiting",
        _500="The policy failed",
        _503="The server is shutting down",
        _504="No answer in time",
    ),
}
RESET_REQUEST: dict[str, Any] = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["session_id"],
                "properties": {"session_id": {"type": "string", "minLength": 1, "maxLength": 128}},
            },
            "examples": {"session": {"value": {"session_id": "robot 1"}}},
        }
    },
}
RESET_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "How many observations were dropped",
        "content": {
            "application/json": {"schema": {"type": "object", "properties": {"dropped": {"type": "integer"}}}}
        },
    },
    **_GUARDED,
    **_failures(_400="The body is not JSON", _422="There is no session in it"),
}
READY_RESPONSES: dict[int | str, dict[str, Any]] = {503: {"description": "Shutting down, or failing"}}
