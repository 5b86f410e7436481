// safetensors.h: any file is opened or refused; what is opened can be found and read within the file.
#include "fuzz.h"
#include "llmc/files/safetensors.h"

static float values[1 << 20];

static void read_all(const Safetensors *st) {
    uint64_t bytes = 0;
    for (size_t i = 0; i < st->count; i++) {
        const SafetensorsEntry *entry = &st->entries[i];
        FUZZ_CHECK(entry->offset <= st->size && entry->size <= st->size - entry->offset);
        FUZZ_CHECK(safetensors_require(st, entry->name, entry->ndim, entry->shape) == entry);
        bytes += entry->size;
    }
    FUZZ_CHECK(bytes <= st->size); // no overlap
    for (size_t i = 0; i < st->count; i++) {
        safetensors_read_f32(st, &st->entries[i], values); // dies at a dtype that it cannot read
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static Safetensors st; // survives the longjmp
    memset(&st, 0, sizeof(st));
    st.path = "fuzz.safetensors";
    st.hint = "";
    st.data = data;
    st.size = size;
    if (size < sizeof(values) / 4 && setjmp(fuzz_died) == 0) {
        safetensors_read_header(&st);
        read_all(&st);
    }
    free(st.entries);
    json_arena_free(&st.arena);
    return 0;
}

// most mutations keep the header's length right, so that they reach what lies behind it
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t capacity, unsigned seed) {
    size = LLVMFuzzerMutate(data, size, capacity);
    uint64_t end = size;
    while (end > 8 && data[end - 1] != '}') {
        end--;
    }
    if (seed % 8 != 0 && end > 8) {
        uint64_t n = end - 8;
        memcpy(data, &n, 8);
    }
    return size;
}
