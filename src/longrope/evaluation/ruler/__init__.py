"""RULER (Hsieh et al. 2024), generated here from its published definitions: nothing is downloaded.

Tasks, templates, sizes and scoring are those of github.com/NVIDIA/RULER (scripts/data/synthetic, synthetic.yaml,
scripts/eval) at commit c3f5e3b, with the model's prompt as it is (its template `base`). Where this differs:

- the haystack of `niah_*` is the text given as data (RULER: Paul Graham's essays), a new place for every sample;
  a script without blanks is cut behind its sentences, and a text without either is refused;
- words come from the `wonderwords` package, as in RULER, in the version installed; where common words need more of them
  than it has, all are adjective-noun pairs (RULER: a second list);
- every sample draws anew (RULER keeps one order of needles, words and documents for a whole run);
- below 4,096 tokens, RULER's shortest length, the room for a reply is that of the reference answer and 8 tokens where
  that is less than RULER's: a window of 256 tokens would otherwise hold no task;
- `qa_1` takes any file in SQuAD's format; `qa_2` (HotpotQA) is left out.
"""
