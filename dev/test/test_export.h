/*
export.h and tokenizer_files.h: what is in an exported folder and what is not, that its files say the same as
the run's, that they come back, and what is refused. A checkpoint has its tokenizer with it wherever it goes.
(dev/hf/check_hf.py loads such folders in transformers.)
*/
#ifndef TEST_EXPORT_H
#define TEST_EXPORT_H

#include "dev/test/test_tokenizer.h"
#include "dev/test/test_trainer.h"
#include "llmc/run/export.h"

#define EXPORT_TEST "build/test/export"
#define EXPORT_MODEL                                                                                         \
    "--layers 2 --hidden 16 --heads 2 --kv-heads 1 --ffn-mult 2 --experts 4 --vocab-size 320 --seq-len 16 "  \
    "--batch 4 --lr 1e-2 --lambda-init 1e-3 --steps 4 --sample-tokens 8 "

static const char *const export_common[] = {
    "README.md",         "config.json",    "generation_config.json", "merges.txt",
    "model.safetensors", "tokenizer.json", "tokenizer_config.json",  "vocab.json"};
static const char *const export_code[] = {"configuration_remoe.py", "modeling_remoe.py"};
enum {
    EXPORT_COMMON = sizeof(export_common) / sizeof(export_common[0]),
    EXPORT_CODE = sizeof(export_code) / sizeof(export_code[0])
};

// this process's folder, of which no export may know
static const char *export_here(void) {
    static char here[PATH_SIZE];
    CHECK(getcwd(here, sizeof(here)) != NULL);
    return here;
}

// runs and exports are named with all of their path, so that it could leak
static void export_train(const char *name, const char *words) {
    const char *here = export_here();
    tk_write();
    trainer_succeeds(trainer_run(EXPORT_MODEL "%s --data %s/build/test/train.bin --tokenizer %s/" TK_FOLDER
                                              " --out %s/" EXPORT_TEST "/%s",
                                 words, here, here, here, name),
                     name);
}

static void export_run(const char *name, const char *to, const char *words) {
    trainer_succeeds(trainer_run("--load %s/" EXPORT_TEST "/%s --export " EXPORT_TEST "/%s %s", export_here(),
                                 name, to, words),
                     to);
}

static char *export_read_file(const char *folder, const char *name, size_t *size) {
    char path[PATH_SIZE];
    check_format(path, sizeof(path), EXPORT_TEST "/%s/%s", folder, name);
    return check_read_file(path, size, "");
}

static int export_has(const char *folder, const char *name) {
    char path[PATH_SIZE];
    check_format(path, sizeof(path), EXPORT_TEST "/%s/%s", folder, name);
    return path_exists(path);
}

static int export_is_free(const char *name) {
    return !export_has(name, "") && !export_has(".tmp_", name);
}

// ----------------------------------------------------------------------------
// what is in there

static int export_count(const char *folder) {
    char path[PATH_SIZE];
    struct dirent **names;
    check_format(path, sizeof(path), EXPORT_TEST "/%s", folder);
    int n = scandir(path, &names, NULL, NULL);
    for (int i = 0; i < n; i++) {
        free(names[i]);
    }
    free(names);
    return n - 2; // . and ..
}

// there, good JSON if it is called so, and silent about this machine
static void export_check_file(const char *folder, const char *name) {
    size_t size;
    if (!CHECK(export_has(folder, name))) {
        printf("    %s/%s\n", folder, name);
        return;
    }
    char *text = export_read_file(folder, name, &size);
    const char *here = export_here();
    int tells = memmem(text, size, here, strlen(here)) != NULL || memmem(text, size, "build/", 6) != NULL;
    if (!CHECK(!tells && size > 0)) {
        printf("    %s/%s\n", folder, name);
    }
    if (strstr(name, ".json") != NULL) {
        JsonArena arena;
        char error[256];
        json_arena_init(&arena);
        const Json *json = json_parse(text, size, &arena, error, sizeof(error));
        CHECK(json != NULL && json->type == JSON_OBJECT && json_duplicate_key(json) == NULL);
        json_arena_free(&arena);
    }
    free(text);
}

static void export_check_files(const char *folder, int with_code) {
    for (int i = 0; i < EXPORT_COMMON; i++) {
        export_check_file(folder, export_common[i]);
    }
    for (int i = 0; i < EXPORT_CODE && with_code; i++) {
        export_check_file(folder, export_code[i]);
    }
    CHECK(export_count(folder) == EXPORT_COMMON + (with_code ? EXPORT_CODE : 0));
}

static int export_says(const char *folder, const char *name, const char *words) {
    char *text = export_read_file(folder, name, NULL);
    int says = strstr(text, words) != NULL;
    free(text);
    return says;
}

// the token ids are the tokenizer's wherever they stand
static void export_check_ids(const char *folder) {
    char words[64];
    check_format(words, sizeof(words), "\"eos_token_id\": %d", TK_VOCAB - 1);
    CHECK(export_says(folder, "config.json", words));
    CHECK(!export_has(folder, "generation_config.json") ||
          export_says(folder, "generation_config.json", words));
    check_format(words, sizeof(words), "\"bos_token_id\": %d", TK_VOCAB - 1);
    CHECK(export_says(folder, "config.json", words));
    check_format(words, sizeof(words), "\"%d\": {\"content\": \"<|endoftext|>\"", TK_VOCAB - 1);
    CHECK(export_says(folder, "tokenizer_config.json", words));
    CHECK(export_says(folder, "tokenizer_config.json", "\"tokenizer_class\": \"GPT2Tokenizer\""));
}

// the one-file form holds the vocabulary and the merges
static void export_check_tokenizer_json(const char *folder) {
    JsonArena arena;
    int64_t id = 0;
    json_arena_init(&arena);
    char path[PATH_SIZE];
    check_format(path, sizeof(path), EXPORT_TEST "/%s/tokenizer.json", folder);
    const Json *json = json_parse_file(path, &arena, "");
    const Json *model = json_get(json, "model"), *merges = json_get(model, "merges");
    CHECK(json_get(model, "vocab")->count == TK_VOCAB && merges->count == TK_MERGES);
    CHECK(json_is_text(merges->child, "a b") && json_is_text(merges->child->next->next, "b c"));
    CHECK(json_int64(json_get(json_get(json, "added_tokens")->child, "id"), &id) && id == TK_VOCAB - 1);
    json_arena_free(&arena);
}

static void test_export_moe(void) {
    export_train("relu", "--granularity 2 --val-data build/test/train.bin");
    export_run("relu", "relu_f32", "");
    export_check_files("relu_f32", 1);
    export_check_ids("relu_f32");
    export_check_ids("relu/latest");
    export_check_tokenizer_json("relu_f32");
    CHECK(trainer_files_equal(EXPORT_TEST "/relu_f32/vocab.json", TK_FOLDER "/vocab.json"));
    CHECK(trainer_files_equal(EXPORT_TEST "/relu/latest/merges.txt", TK_FOLDER "/merges.txt"));
    CHECK(trainer_files_equal(EXPORT_TEST "/relu_f32/model.safetensors",
                              EXPORT_TEST "/relu/latest/model.safetensors"));
    CHECK(trainer_files_equal(EXPORT_TEST "/relu_f32/modeling_remoe.py", "dev/hf/modeling_remoe.py"));
    CHECK(
        trainer_files_equal(EXPORT_TEST "/relu_f32/configuration_remoe.py", "dev/hf/configuration_remoe.py"));
    CHECK(export_says("relu_f32", "config.json",
                      "\"AutoModelForCausalLM\": \"modeling_remoe.RemoeForCausalLM\""));
    CHECK(export_says("relu_f32", "config.json", "\"auto_map\": {"));
    CHECK(export_says("relu_f32", "config.json", "\"torch_dtype\": \"float32\""));
    CHECK(export_says("relu_f32", "README.md", "# relu_f32\n"));
    CHECK(export_says("relu_f32", "README.md", "4 steps, 256 tokens (sequences of 16), of: `train.bin`."));
    CHECK(export_says("relu_f32", "README.md", "| experts per layer | 8, 2 active on average"));
    CHECK(export_says("relu_f32", "README.md", "Training loss, mean of the last 4 steps: 5."));
    CHECK(export_says("relu_f32", "README.md", "| validation loss after 4 steps | nats per token |"));
    CHECK(export_says("relu_f32", "README.md", "| all | 5."));
    CHECK(!export_has("relu_f32", "optimizer.safetensors") && !export_has("relu_f32", "state.json"));
}

static void test_export_lory(void) {
    export_train("lory", "--router lory --segment-length 4");
    export_run("lory", "lory_f32", "");
    CHECK(export_says("lory_f32", "README.md", "| experts per layer | 4, merged anew every 4 tokens |"));
    CHECK(export_says("lory_f32", "README.md", "first 4 tokens are routed by their own mean"));
    CHECK(!export_says("lory_f32", "README.md", "active"));
}

static void test_export_dense(void) {
    export_train("dense", "--router dense");
    export_run("dense", "dense_f32/", ""); // a / at the end is no other folder
    export_check_files("dense_f32", 0);
    export_check_ids("dense_f32");
    CHECK(export_says("dense_f32", "config.json", "\"LlamaForCausalLM\""));
    CHECK(!export_says("dense_f32", "config.json", "auto_map"));
    CHECK(!export_says("dense_f32", "README.md", "trust_remote_code"));
}

// the loss behind "all" that the last run printed
static double export_loss(void) {
    const char *all = strstr(trainer_output, "all ");
    return all != NULL ? atof(all + 4) : NAN;
}

// half the bytes, and nearly the same loss; as bits they are the weights rounded
static void test_export_bf16(void) {
    const char *eval =
        "--load " EXPORT_TEST "/%s --eval --val-data build/test/train.bin --seq-len 16 --batch 4";
    const char *exported = "relu_bf16", *own = "relu";
    mkdir(EXPORT_TEST "/relu_bf16", 0777); // an empty folder is as good as none
    export_run("relu", exported, "--save-dtype bf16");
    export_check_files(exported, 1);
    CHECK(export_says(exported, "config.json", "\"torch_dtype\": \"bfloat16\""));
    trainer_compare("bf16", EXPORT_TEST "/relu_bf16/model.safetensors",
                    EXPORT_TEST "/relu/latest/model.safetensors", 4e-3);
    CHECK(!trainer_files_equal(EXPORT_TEST "/relu_bf16/model.safetensors",
                               EXPORT_TEST "/relu/latest/model.safetensors"));
    trainer_succeeds(trainer_run(eval, own), "eval");
    double want = export_loss();
    trainer_succeeds(trainer_run(eval, exported), "eval of the export");
    CHECK(fabs(export_loss() - want) < 0.01 * want);
    export_run(exported, "again", "--save-dtype bf16"); // an export is exported as a checkpoint is
    CHECK(trainer_files_equal(EXPORT_TEST "/relu_bf16/model.safetensors",
                              EXPORT_TEST "/again/model.safetensors"));
}

// folders are the user's, however they are named
static void test_export_card_data(void) {
    static const char *const cases[][2] = {
        {"/home/me/data/train_*.bin", " `train_*.bin`"},
        {"a/b*.bin:0.7,../c.bin:0.3", " `b*.bin:0.7`, `c.bin:0.3`"},
        {"x.bin", " `x.bin`"},
    };
    for (int i = 0; i < 3; i++) {
        char *text = NULL;
        size_t size;
        FILE *file = open_memstream(&text, &size);
        card_data(file, cases[i][0]);
        fclose(file);
        CHECK(strcmp(text, cases[i][1]) == 0);
        free(text);
    }
}

// what a card says of the losses in this log, of the checkpoint EXPORT_TEST/card/step_00000003
static char *export_card_losses(const char *log) {
    char *text = NULL;
    size_t size;
    ModelCard card;
    RunState state;
    memset(&card, 0, sizeof(card));
    memset(&state, 0, sizeof(state));
    state.step = 3;
    card.state = &state;
    card.checkpoint = EXPORT_TEST "/card/step_00000003";
    make_folder(card.checkpoint);
    FILE *file = check_fopen(EXPORT_TEST "/card/log.jsonl", "wb", "");
    fputs(log, file);
    check_fclose(file, "log.jsonl");
    file = open_memstream(&text, &size);
    card_losses(&card, file);
    fclose(file);
    return text;
}

// steps before the checkpoint's, and the last validation up to it; what a kill has torn is passed over
static void test_export_card_losses(void) {
    static const char *const cases[][2] = {
        {"{\"step\": 0, \"lm_loss\": 4.5}\n{\"step\": 1, \"lm_loss\": null}\n{\"step\": 2, \"lm_loss\": 3}\n"
         "{\"step\": 3, \"lm_loss\": 100}\n",
         "Training loss, mean of the last 2 steps: 3.7500 nats per token.\n\n"},
        {"{\"step\": 1, \"val_loss\": 9, \"domain\": \"c\"}\n{\"step\": 1, \"val_loss\": 9, \"domain\": "
         "\"all\"}\n"
         "{\"step\": 3, \"val_loss\": 5.25, \"domain\": \"a|b\"}\n{\"step\": 3, \"val_l\n"
         "{\"step\": 3, \"val_loss\": 5.5, \"domain\": \"all\"}\n{\"step\": 4, \"val_loss\": 1, \"domain\": "
         "\"all\"}\n",
         "\n| validation loss after 3 steps | nats per token |\n|---|---|\n| a b | 5.2500 |\n| all | 5.5000 "
         "|\n\n"},
        {"[1]\n{\"step\": -1, \"lm_loss\": 1}\n{\"step\": 2, \"val_loss\": 1, \"domain\": 1}\nhalf a row",
         ""},
    };
    for (int i = 0; i < 3; i++) {
        char *text = export_card_losses(cases[i][0]);
        if (!CHECK(strcmp(text, cases[i][1]) == 0)) {
            printf("    %s\n", text);
        }
        free(text);
    }
}

// ----------------------------------------------------------------------------
// a checkpoint's own tokenizer

static void export_main_elsewhere(void *command) {
    if (mkdir(EXPORT_TEST "/elsewhere", 0777) == 0 && chdir(EXPORT_TEST "/elsewhere") == 0) {
        trainer_main(command);
    }
}

// what --sample has written, without the line that says how fast
static const char *export_sample(void) {
    char *speed = strstr(trainer_output, " tok/s\n");
    while (speed != NULL && speed > trainer_output && speed[-1] != '\n') {
        speed--;
    }
    if (speed != NULL) {
        *speed = '\0';
    }
    return trainer_output;
}

// the run's data and vocabulary are gone, and the working folder is another
static void test_export_travels(void) {
    static TrainerCommand command;
    char path[PATH_SIZE], here[4096], text[sizeof(trainer_output)];
    trainer_succeeds(trainer_run("--load " EXPORT_TEST "/relu --sample he"), "sample");
    strcpy(text, export_sample());
    CHECK(rename(TK_FOLDER, EXPORT_TEST "/away") == 0);
    check_format(path, sizeof(path), "%s/" EXPORT_TEST, export_here());
    check_format(here, sizeof(here), "--load %s/relu --sample he", path);
    trainer_words(&command, here);
    CHECK(run_in_child(export_main_elsewhere, &command, trainer_output, sizeof(trainer_output)) == 0);
    CHECK(strncmp(trainer_output, "he", 2) == 0 && strcmp(export_sample(), text) == 0);
    trainer_succeeds(
        trainer_run("--load " EXPORT_TEST "/relu_f32 --sample he --seq-len 16 --sample-tokens 8"),
        "sample of an export");
    CHECK(strcmp(export_sample(), text) == 0);
    trainer_succeeds(trainer_run("--resume " EXPORT_TEST "/relu --steps 6 --warmup-steps 1"), "resume");
    CHECK(strstr(trainer_output, "warning") == NULL && export_has("relu/step_00000006", "merges.txt"));
    export_check_ids("relu/step_00000006");
    unlink(EXPORT_TEST "/relu_f32/vocab.json"); // as transformers 5 saves it
    unlink(EXPORT_TEST "/relu_f32/merges.txt");
    trainer_succeeds(
        trainer_run("--load " EXPORT_TEST "/relu_f32 --sample he --seq-len 16 --sample-tokens 8"),
        "sample by tokenizer.json");
    CHECK(strcmp(export_sample(), text) == 0);
    trainer_refuses(1, "no tokenizer: there is no build/test/nowhere/vocab.json",
                    "--load " EXPORT_TEST "/relu --sample he --tokenizer build/test/nowhere");
    CHECK(rename(EXPORT_TEST "/away", TK_FOLDER) == 0);
}

// a folder by others, without a tokenizer: none is made up for it, though there is one at the default's place
static void test_export_foreign(void) {
    trainer_succeeds(trainer_run("--load dev/test/fixtures/topk --export " EXPORT_TEST "/foreign"),
                     "foreign");
    CHECK(strstr(trainer_output, "warning: no tokenizer goes along") != NULL);
    CHECK(export_says("foreign", "config.json", "\"eos_token_id\": null"));
    CHECK(export_says("foreign", "generation_config.json", "\"eos_token_id\": null"));
    CHECK(!export_has("foreign", "vocab.json") && !export_says("foreign", "README.md", "## Training"));
    trainer_succeeds(
        trainer_run("--load dev/test/fixtures/topk --tokenizer= --export " EXPORT_TEST "/without"),
        "without");
    CHECK(strstr(trainer_output, "warning") == NULL && !export_has("without", "tokenizer.json"));
    trainer_refuses(1, "has 275 tokens, the model's vocabulary only 67",
                    "--load dev/test/fixtures/topk --export " EXPORT_TEST "/refused --tokenizer " TK_FOLDER);
}

// ----------------------------------------------------------------------------
// what is refused

static void test_export_refused(void) {
    const char *load = "--load " EXPORT_TEST "/relu --export " EXPORT_TEST;
    char words[PATH_SIZE];
    static const char *const taken[] = {"relu", "relu/latest", "relu_f32/", "relu_f32/config.json"};
    for (int i = 0; i < 4; i++) {
        check_format(words, sizeof(words), "%s/%s", load, taken[i]);
        trainer_refuses(1, "there is something there already", words);
    }
    CHECK(export_has("relu/latest", "optimizer.safetensors") && export_count("relu_f32") == 8);
    trainer_refuses(2, "the name of a new folder", "--load " EXPORT_TEST "/relu --export .");
    trainer_refuses(2, "the name of a new folder", "--load " EXPORT_TEST "/relu --export /");
    trainer_refuses(2, "is empty, expected a path", "--load " EXPORT_TEST "/relu --export=");
    trainer_refuses(2, "--export need a model", "--export " EXPORT_TEST "/refused");
    check_format(words, sizeof(words), "%s/refused --eval --val-data build/test/train.bin", load);
    trainer_refuses(2, "--eval and --export exclude each other", words);
    check_format(words, sizeof(words), "%s/refused --score a --out b", load);
    trainer_refuses(2, "--score and --export exclude each other", words);
    check_format(words, sizeof(words), "%s/refused --tokenizer build/test/nowhere", load);
    trainer_refuses(1, "--tokenizer build/test/nowhere: expected a folder with vocab.json", words);
    check_format(words, sizeof(words), "%s/relu_f32/config.json/refused", load);
    trainer_refuses(1, "cannot make the folder", words);
    CHECK(export_is_free("refused"));
}

// the folder has its name only when it is whole
static void test_export_full_disk(void) {
    static TrainerCommand command;
    trainer_words(&command, "--load " EXPORT_TEST "/relu --export " EXPORT_TEST "/full");
    command.largest_file = 20000;
    check_dies(1, "cannot write " EXPORT_TEST "/.tmp_full/model.safetensors", trainer_main, &command);
    CHECK(!export_has("full", ""));
    export_run("relu", "full", ""); // what was left behind is in nobody's way
    export_check_files("full", 1);
    CHECK(!export_has(".tmp_full", ""));
}

static void test_export(void) {
    trainer_clear("export");
    trainer_make_shard("build/test/train.bin", 4000, 64);
    test_export_moe();
    test_export_lory();
    test_export_dense();
    test_export_bf16();
    test_export_card_data();
    test_export_card_losses();
    test_export_travels();
    test_export_foreign();
    test_export_refused();
    test_export_full_disk();
    trainer_clear("export");
}

#endif
