#!/bin/sh
# 50,304 pieces from OpenWebText: the tokenizer of the base, medium and large configs, as many as GPT-2's padded 50,257.
exec tostlm tokenizer train --source Skylion007/openwebtext --vocab-size 50304 --out "${1:?where to write the .model file}"
