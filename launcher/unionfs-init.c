/* unionfs-init INFO BLOCK FILTER COMMAND...: pid 1 of a container that an OCI runtime has made.
 *
 * It is linked statically, because the container's tree need not have a C library, and executed from memory, so
 * that it is in no tree. INFO, BLOCK and FILTER are fds; -1 stands for none. It reports on INFO that the
 * container exists, waits on BLOCK, filters system calls by the instructions in FILTER (struct sock_filter[]),
 * starts the command, reaps what becomes its child, and ends with the command: exit code, or 128 plus the
 * signal's number. As docker's, the exit code is 126 or 127 if the command cannot be executed or found.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef SYS_close_range
#define SYS_close_range 436 /* on every architecture */
#endif
#define OWN_FAILURE 125
#define FIRST 3 /* of the fds that the runtime passes on */

static struct sock_filter instructions[BPF_MAXINSNS];

static void fail(const char *what)
{
	fprintf(stderr, "unionfs: the container's init failed: %s: %s\n", what, strerror(errno));
	_exit(OWN_FAILURE);
}

static int number(const char *text)
{
	return (int)strtol(text, NULL, 10);
}

static unsigned short read_filter(int fd)
{
	size_t have = 0;
	ssize_t got;

	while (have < sizeof(instructions)) {
		got = read(fd, (char *)instructions + have, sizeof(instructions) - have);
		if (got < 0)
			fail("the filter of system calls");
		if (got == 0)
			break;
		have += (size_t)got;
	}
	return (unsigned short)(have / sizeof(instructions[0]));
}

/* Let the terminal, if a standard file is one, be that of a session of this process. */
static void take_terminal(void)
{
	for (int fd = 0; fd < FIRST; fd++) {
		if (!isatty(fd))
			continue;
		setsid(); /* EPERM: the runtime has made a session */
		if (ioctl(fd, TIOCSCTTY, 0) != 0)
			fail("the terminal");
		return;
	}
}

int main(int argc, char **argv)
{
	static const char made[] = "{\"child-pid\": 1}\n";
	struct sock_fprog program = {0, instructions};
	int info, block, filter, null, status, code;
	pid_t child, ended;
	sigset_t none;
	char byte;

	if (argc < 5 || getpid() != 1) {
		fputs("unionfs-init: it is for containers of `unionfs run`.\n", stderr);
		return OWN_FAILURE;
	}
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	info = number(argv[1]), block = number(argv[2]), filter = number(argv[3]);
	take_terminal();
	if (filter >= 0)
		program.len = read_filter(filter);
	if (write(info, made, sizeof(made) - 1) != sizeof(made) - 1)
		fail("the report");
	close(info);
	if (block >= 0)
		while (read(block, &byte, 1) < 0 && errno == EINTR)
			;
	/* Also its own program, which is open. */
	if (syscall(SYS_close_range, FIRST, ~0U, 0) != 0)
		for (int fd = FIRST; fd < 1024; fd++)
			close(fd);
	/* The runtime has set no_new_privs. */
	if (filter >= 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program, 0, 0) != 0)
		fail("the filter of system calls");
	child = fork();
	if (child < 0)
		fail("fork");
	if (child == 0) {
		execvp(argv[4], argv + 4);
		code = errno == ENOENT ? 127 : 126;
		fprintf(stderr, "unionfs: %s cannot be executed: %s\n", argv[4], strerror(errno));
		_exit(code);
	}
	/* The readers of the command's files wait for the command alone. */
	null = open("/dev/null", O_RDWR | O_CLOEXEC);
	for (int fd = 0; fd < FIRST; fd++)
		if (null < 0 || dup2(null, fd) < 0)
			close(fd);
	if (null >= FIRST)
		close(null);
	while ((ended = wait(&status)) != child)
		if (ended < 0 && errno != EINTR)
			_exit(OWN_FAILURE);
	_exit(WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status));
}
