# remoe.c: make train trains the tiny preset on the built-in sample, make test runs the CPU tests; make help lists the rest.

CC ?= cc
# fp-contract and the two no- flags let loops use fused multiply-adds and vector selects; none of them reorders a sum
CFLAGS ?= -O3 -march=native
override CFLAGS += -std=c11 -D_GNU_SOURCE -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wall -Wextra -Werror
LDLIBS += -lm -lpthread

# OpenMP is used where the compiler has it (OPENMP=0 leaves it out); the loops' SIMD hints need no library
OPENMP ?= $(shell printf 'int main(void) { return 0; }' | $(CC) -fopenmp -x c - -o /dev/null 2>/dev/null && echo 1 || echo 0)
ifeq ($(OPENMP),1)
  override CFLAGS += -fopenmp
else
  override CFLAGS += -fopenmp-simd -Wno-unknown-pragmas
endif
# 512-bit registers where the machine has them: compilers are shy of them by default
ifneq ($(findstring -march=native,$(CFLAGS)),)
  ifeq ($(shell $(CC) -march=native -dM -E -x c /dev/null 2>/dev/null | grep -c __AVX512F__),1)
    override CFLAGS += -mprefer-vector-width=512
  endif
endif

HEADERS := $(wildcard llmc/*.h data/*.h)
SAMPLE := build/sample/manifest.json

.PHONY: all train test bench sample sample-data fuzz clean help

all: train_remoe data-tools

train_remoe: train_remoe.c $(HEADERS) Makefile
	$(CC) $(CFLAGS) $< -o $@ $(LDLIBS)

test_remoe: test_remoe.c train_remoe.c $(HEADERS) $(wildcard dev/test/*.h) Makefile
	$(CC) $(CFLAGS) $< -o $@ $(LDLIBS)

build/%: data/%.c $(HEADERS) Makefile
	@mkdir -p build
	$(CC) $(CFLAGS) -Illmc $< -o $@ $(LDLIBS)

.PHONY: data-tools
data-tools: build/train_tokenizer build/tokenize

# the built-in sample: a vocabulary of its own, and shards
$(SAMPLE): data/sample.jsonl build/train_tokenizer build/tokenize
	@mkdir -p build/sample
	build/train_tokenizer --vocab-size 2048 --out build/sample data/sample.jsonl
	rm -f build/sample/*.bin* build/sample/manifest.json build/sample/tokenize.state.json build/sample/unreadable.txt*
	build/tokenize --tokenizer build/sample --out build/sample --val-fraction 0.1 data/sample.jsonl

sample-data: $(SAMPLE)

sample:
	data/make_sample.sh

train: train_remoe $(SAMPLE)
	./train_remoe

test: test_remoe train_remoe $(SAMPLE)
	./test_remoe

build/bench_matmul: dev/bench/bench_matmul.c $(HEADERS) Makefile
	@mkdir -p build
	$(CC) $(CFLAGS) -Illmc $< -o $@ $(LDLIBS) -ldl

build/bench_tokenizer: dev/bench/bench_tokenizer.c $(HEADERS) Makefile
	@mkdir -p build
	$(CC) $(CFLAGS) $< -o $@ $(LDLIBS)

bench: build/bench_matmul train_remoe $(SAMPLE)
	build/bench_matmul
	./train_remoe --bench --lambda-init 1e-3

# one fuzz target (clang's libFuzzer) for FUZZ_SECONDS; a find goes to dev/fuzz/corpus, which the tests replay
TARGET ?= fuzz_json
FUZZ_SECONDS ?= 60
fuzz:
	@mkdir -p build/fuzz/$(TARGET)
	clang -g -O1 -march=native -D_GNU_SOURCE -fsanitize=fuzzer,address,undefined -Wno-unknown-pragmas -I. -Illmc \
		dev/fuzz/$(TARGET).c -o build/$(TARGET) -lm -lpthread
	build/$(TARGET) -max_total_time=$(FUZZ_SECONDS) -close_fd_mask=2 -max_len=65536 -detect_leaks=0 -rss_limit_mb=4096 \
		-artifact_prefix=build/fuzz/ build/fuzz/$(TARGET) $(wildcard dev/fuzz/corpus/$(TARGET:fuzz_%=%))

clean:
	rm -rf build train_remoe train_remoecu test_remoe test_remoecu

help:
	@echo 'make train        train the tiny preset on the built-in sample, through the three stages, and show text'
	@echo 'make test         the CPU tests'
	@echo 'make bench        sgemm against OpenBLAS (where installed), and the trainer'
	@echo 'make sample       remake data/sample.jsonl from the sources'
	@echo 'make sample-data  its vocabulary and token shards, in build/sample'
	@echo 'make clean        remove what was built; runs/ stays'
