"""Runs in CTranslate2's environment: converts the folder, or says why it cannot."""

import json
import sys
from pathlib import Path

import ctranslate2
from ctranslate2.converters import TransformersConverter

job = json.loads(Path(sys.argv[1]).read_text())
answer = {"version": ctranslate2.__version__, "refused": ""}
try:
    TransformersConverter(job["folder"]).convert(str(Path(job["scratch"]) / "ct2"))
except Exception as error:
    answer["refused"] = " ".join(str(error).split())
Path(job["out"]).write_text(json.dumps(answer))
