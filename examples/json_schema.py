"""Text that keeps to a JSON schema, to a regular expression, to a grammar: whatever the model would rather say.

python examples/json_schema.py [MODEL]
"""

import json
import sys

import ggpy

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 969},
        "tribe": {"enum": ["Judah", "Levi", "Benjamin"]},
    },
    "required": ["name", "age", "tribe"],
    "additionalProperties": False,
}
VERSE = r"And [a-z ]{5,30}, and [a-z ]{5,30}\."
ARITHMETIC = 'start: NUMBER ("+" NUMBER)+ "=" NUMBER\nNUMBER: /[0-9]{1,3}/'


def main(path: str) -> None:
    with ggpy.load(path, n_ctx=512) as model:
        for seed in range(3):
            text = model.generate("Now there was a man: ", json_schema=PERSON, seed=seed, max_tokens=300).run().text
            print(json.loads(text))
        print(model.generate("", regex=VERSE, seed=1, max_tokens=60).run().text)
        print(model.generate("The sum is ", grammar=ARITHMETIC, seed=2, max_tokens=40).run().text)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "demo")
