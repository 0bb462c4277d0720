#!/bin/sh
# GPT-2's 50,257 pieces from tiktoken's file of its ranks, r50k_base.tiktoken. Nothing is downloaded.
exec tostlm tokenizer import "${1:?the ranks file}" --out "${2:?where to write the tokenizer.json}"
