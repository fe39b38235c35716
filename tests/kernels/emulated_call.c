/* One call of the compiled kernels in a process of its own: run under an emulator of another CPU by test_fused_arm.py.
 *
 * Standard input: the function's number, the bytes of `Call`, how many pointers of it are set, and for each its offset
 * in `Call`, its length in bytes and what it points to. Standard output: all of these buffers after the call. */
#define ELEMENT char
#include "call.h"
#include <stdio.h>
#include <stdlib.h>
#ifdef _WIN32
#include <fcntl.h>
#include <io.h>
#endif

int64_t hf_call_size(void);
void hap_forward(const Call *call);
void hap_backward(const Call *call);
void hap_decode(const Call *call);

static void get(void *to, size_t bytes) {
    if (fread(to, 1, bytes, stdin) != bytes)
        exit(2);
}

int main(void) {
    void (*const functions[])(const Call *) = {hap_forward, hap_backward, hap_decode};
    enum { MOST = 64 };
    int64_t function, size, count, place[MOST][2];
    char *buffers[MOST];
    Call call;
#ifdef _WIN32
    _setmode(_fileno(stdin), _O_BINARY);
    _setmode(_fileno(stdout), _O_BINARY);
#endif
    get(&function, sizeof function);
    get(&size, sizeof size);
    if (size != (int64_t)sizeof call || size != hf_call_size())
        return 3;
    get(&call, sizeof call);
    get(&count, sizeof count);
    for (int64_t i = 0; i < count; i++) {
        get(place[i], sizeof place[i]);
        buffers[i] = malloc(place[i][1] + 64);
        get(buffers[i], place[i][1]);
        *(void **)((char *)&call + place[i][0]) = buffers[i];
    }
    functions[function](&call);
    for (int64_t i = 0; i < count; i++)
        fwrite(buffers[i], 1, place[i][1], stdout);
    return 0;
}
