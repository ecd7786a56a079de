/* A device's client for predlog: each event becomes its rows exactly once, through outages, kills and power cuts.
 *
 * C99, POSIX files and libcurl; no threads. On an ESP32, let the folder be on LittleFS or an SD card, and set the same
 * options on esp_http_client. In a program, call put() for each event, and turn() from the main loop. As a program,
 * it reads one JSON event per line from stdin, and ends when all of them have been answered:
 *
 *     cc -std=c99 -O2 -o predlog_client predlog_client.c -lcurl
 *     API_TOKEN=... ./predlog_client http://predlog.example:8000 spool < events.ndjson
 *
  * The spool is a folder that one process uses at a time:
 *
 *     open               events that were never sent, one JSON line each; only appended to
 *     <number>-<random>  a request; it never changes, its name is its Idempotency-Key, it stays until it is answered
 *     refused            the first MB of events that predlog will never take (413, 422), for a person to look at
 *
 * Key and position name an event of a batch, so a retry must repeat the same bytes under the same key. That is why
 * `open` is first renamed to a request, and only then sent. A single waiting event is sent to /process, several as a
 * batch. */
#define _POSIX_C_SOURCE 200809L
#include <curl/curl.h>
#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { BATCH_BYTES = 64 * 1024, SPOOL_BYTES = 64 * 1024 * 1024, REFUSED_BYTES = 1024 * 1024, NAME_BYTES = 64 };
enum { ANSWER_SECONDS = 30 }; /* longer than predlog waits for its broker (CONFIRM_TIMEOUT_MS, 10 s) */
enum { FIRST_PAUSE_MS = 500, LONGEST_PAUSE_MS = 60 * 1000 };

struct buffer { char *bytes; size_t size; }; /* bytes[size] is 0 */

static const char *url, *token;
static CURL *curl;
static double retry_at_ms;
static int attempts;

static int extend(struct buffer *buffer, const char *bytes, size_t size) {
    char *grown = realloc(buffer->bytes, buffer->size + size + 1);
    if (!grown) return -1;
    if (size) memcpy(grown + buffer->size, bytes, size);
    buffer->bytes = grown;
    buffer->size += size;
    grown[buffer->size] = 0;
    return 0;
}

static size_t take(char *bytes, size_t one, size_t size, void *buffer) {
    return extend(buffer, bytes, one * size) ? 0 : one * size;
}

static double now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1e3 + now.tv_nsec / 1e6;
}

static void random_bytes(void *into, size_t size) { /* esp_fill_random() */
    int file = open("/dev/urandom", O_RDONLY);
    if (file < 0 || read(file, into, size) != (ssize_t)size) abort();
    close(file);
}

/* The names of files are relative to the spool, which is the working directory. */

static long size_of(const char *name) {
    struct stat info;
    return stat(name, &info) ? 0 : (long)info.st_size;
}

static void sync_folder(void) {
    int folder = open(".", O_RDONLY);
    fsync(folder);
    close(folder);
}

static int append(const char *name, const char *bytes, size_t size) {
    long start = size_of(name);
    int file = open(name, O_WRONLY | O_APPEND | O_CREAT, 0600);
    int failed = file < 0 || write(file, bytes, size) != (ssize_t)size || fsync(file);
    if (failed && file >= 0 && ftruncate(file, start)) perror("predlog"); /* leave no half line */
    if (file >= 0) close(file);
    if (!failed && start == 0) sync_folder();
    return failed ? -1 : 0;
}

static struct buffer contents(const char *name) {
    struct buffer buffer = {0};
    char chunk[4096];
    ssize_t size;
    int file = open(name, O_RDONLY);
    while (file >= 0 && (size = read(file, chunk, sizeof chunk)) > 0) if (extend(&buffer, chunk, size)) abort();
    if (file >= 0) close(file);
    return buffer;
}

/* Finds the least or the greatest name of a request ("" if there is none); returns the size of all. */
static long requests(int greatest, char found[NAME_BYTES]) {
    long size = 0;
    DIR *folder = opendir(".");
    struct dirent *entry;
    found[0] = 0;
    while (folder && (entry = readdir(folder))) {
        if (entry->d_name[0] < '0' || entry->d_name[0] > '9' || strlen(entry->d_name) >= NAME_BYTES) continue;
        size += size_of(entry->d_name);
        if (!found[0] || (strcmp(entry->d_name, found) > 0) == greatest) strcpy(found, entry->d_name);
    }
    if (folder) closedir(folder);
    return size;
}

/* Makes a request of what is in `open`, before its first attempt. */
static void seal(void) {
    char last[NAME_BYTES], name[NAME_BYTES];
    unsigned r[4];
    requests(1, last);
    random_bytes(r, sizeof r);
    snprintf(name, sizeof name, "%010ld-%08x%08x%08x%08x", atol(last) + 1, r[0], r[1], r[2], r[3]);
    rename("open", name);
    sync_folder(); /* after a power cut, the request must still have the name it was sent with */
}

/* Opens the spool in this folder. */
static int begin(const char *folder) {
    mkdir(folder, 0700);
    if (chdir(folder)) return -1;
    struct buffer text = contents("open"); /* a kill can leave half a line, from a put() that never returned */
    while (text.size && text.bytes[text.size - 1] != '\n') text.size--;
    int failed = size_of("open") && truncate("open", text.size);
    free(text.bytes);
    curl_global_init(CURL_GLOBAL_DEFAULT);
    curl = curl_easy_init();
    return failed || !curl ? -1 : 0;
}

/* Stores an event, one line of JSON with its '\n', on disk. Returns -1 when the spool or the disk is full. */
static int put(const char *line, size_t size) {
    char name[NAME_BYTES];
    long open_size = size_of("open");
    if (requests(0, name) + open_size + (long)size > SPOOL_BYTES) return -1;
    if (open_size && open_size + size > BATCH_BYTES) seal();
    return append("open", line, size);
}

/* Sends a request; returns its status, or 0 if there was no answer, so that the outcome is unknown. */
static long post(const char *key, struct buffer body, int is_batch, struct buffer *answer, long *retry_after) {
    char text[1024];
    long status = 0;
    curl_off_t seconds = 0;
    struct curl_slist *fields = curl_slist_append(NULL, is_batch ? "Content-Type: application/x-ndjson"
                                                                 : "Content-Type: application/json");
    snprintf(text, sizeof text, "Idempotency-Key: %s", key);
    fields = curl_slist_append(fields, text);
    snprintf(text, sizeof text, "Authorization: Bearer %s", token ? token : "");
    if (token) fields = curl_slist_append(fields, text);
    snprintf(text, sizeof text, "%s/process%s", url, is_batch ? "/batch" : "");
    curl_easy_setopt(curl, CURLOPT_URL, text);
    curl_easy_setopt(curl, CURLOPT_HTTPHEADER, fields);
    curl_easy_setopt(curl, CURLOPT_POSTFIELDS, body.bytes);
    curl_easy_setopt(curl, CURLOPT_POSTFIELDSIZE, (long)body.size);
    curl_easy_setopt(curl, CURLOPT_WRITEFUNCTION, take);
    curl_easy_setopt(curl, CURLOPT_WRITEDATA, answer);
    curl_easy_setopt(curl, CURLOPT_TIMEOUT, (long)ANSWER_SECONDS);
    CURLcode code = curl_easy_perform(curl);
    if (code == CURLE_OK) {
        curl_easy_getinfo(curl, CURLINFO_RESPONSE_CODE, &status);
        curl_easy_getinfo(curl, CURLINFO_RETRY_AFTER, &seconds);
    } else
        fprintf(stderr, "predlog: no answer: %s\n", curl_easy_strerror(code));
    if (status / 100 == 2 && (!answer->size || answer->bytes[0] != '{')) status = 0; /* a captive portal's page */
    curl_slist_free_all(fields);
    *retry_after = (long)seconds;
    return status;
}

static int is_refused(long status) { return status == 413 || status == 422; } /* the event is at fault */

/* Returns the next status in the results of a 207. A quote in a JSON string has a backslash, so no string matches. */
static long next_status(const char **results) {
    *results = strstr(*results, "\"status\":");
    return *results ? strtol(*results += 9, NULL, 10) : 0;
}

/* Sends the oldest request if it is time. Returns the ms until the next call is due, or -1 if the spool is empty. */
static int turn(void) {
    char name[NAME_BYTES];
    if (!requests(0, name) && size_of("open")) seal(), requests(0, name);
    if (!name[0]) return -1;
    if (now_ms() < retry_at_ms) return (int)(retry_at_ms - now_ms()) + 1;

    struct buffer body = contents(name), answer = {0};
    int is_batch = memchr(body.bytes, '\n', body.size - 1) != NULL;
    long retry_after, status = post(name, body, is_batch, &answer, &retry_after), each = status;
    const char *results = answer.bytes, *end = body.bytes + body.size;
    int is_settled = 1;
    for (const char *line = body.bytes; line < end; line = strchr(line, '\n') + 1) {
        if (status == 207) each = results ? next_status(&results) : 0;
        is_settled &= each == 200 || is_refused(each);
    }
    results = answer.bytes;
    for (const char *line = body.bytes, *next; is_settled && line < end; line = next) {
        next = strchr(line, '\n') + 1;
        if (status == 207) each = next_status(&results);
        if (!is_refused(each)) continue;
        fprintf(stderr, "predlog: %ld, never sent again: %.200s\n", each, line);
        if (size_of("refused") + (next - line) <= REFUSED_BYTES) append("refused", line, next - line);
    }
    if (is_settled) {
        unlink(name);
        attempts = 0;
    } else { /* a random pause, so that devices which lost their server together do not return together */
        unsigned r;
        random_bytes(&r, sizeof r);
        double most = attempts < 7 ? FIRST_PAUSE_MS << attempts++ : LONGEST_PAUSE_MS;
        retry_at_ms = now_ms() + 1e3 * retry_after + most * (r / 4294967296.0);
        fprintf(stderr, "predlog: %ld %.200s; the events of %s wait\n", status, answer.size ? answer.bytes : "", name);
    }
    free(body.bytes);
    free(answer.bytes);
    return 0;
}

int main(int count, char **arguments) {
    if (count != 3) return fprintf(stderr, "usage: predlog_client URL SPOOL < events.ndjson\n"), 2;
    url = arguments[1];
    token = getenv("API_TOKEN");
    if (begin(arguments[2])) return perror(arguments[2]), 1;
    struct buffer input = {0};
    char chunk[65536], *end;
    for (int has_ended = 0;;) {
        int pause_ms = turn();
        if (has_ended && pause_ms < 0) return 0;
        struct pollfd stdin_ready = {has_ended ? -1 : 0, POLLIN, 0};
        if (poll(&stdin_ready, 1, pause_ms) <= 0) continue;
        ssize_t size = read(0, chunk, sizeof chunk);
        has_ended = size <= 0;
        if (size > 0 && extend(&input, chunk, size)) abort();
        while (input.size && (end = memchr(input.bytes, '\n', input.size))) {
            size_t length = end + 1 - input.bytes;
            if (length > 1 && put(input.bytes, length)) fprintf(stderr, "predlog: the spool is full: event dropped\n");
            memmove(input.bytes, end + 1, (input.size -= length) + 1);
        }
    }
}
