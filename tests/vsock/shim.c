/*
 * Makes AF_VSOCK sockets of a program on the host those of a guest's socket device: LD_PRELOAD=shim.so, and VSOCK_PATH says where
 * the device's socket is. For the kernel's own vsock tests, which speak AF_VSOCK at both ends (tests/vsock/run).
 *
 * What unix sockets do not have is done here: a receive buffer of a size of one's own (for messages: a thread reads ahead), SO_RCVLOWAT
 * in poll(), and MSG_ZEROCOPY with its completions (the data is copied, and said not to be: the tests ask for it).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>
#include <linux/errqueue.h>
#include <linux/vm_sockets.h>

#ifndef SOL_VSOCK
#define SOL_VSOCK 287
#endif
#ifndef VSOCK_RECVERR
#define VSOCK_RECVERR 1
#endif

/* The guest's address. */
#define GUEST 3
#define DEFAULT_SIZE (256 << 10)

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

struct vsock {
	int is;
	int type;
	unsigned long long size, most;
	int lowat;
	/* Completions of MSG_ZEROCOPY that are yet to be read. */
	int zerocopy, completions;
	unsigned int sent;
	int copied;
	/* Where the thread that reads ahead puts messages. */
	int ahead;
};

static struct vsock socks[1024];

static struct vsock *get(int fd)
{
	return fd >= 0 && fd < 1024 && socks[fd].is ? &socks[fd] : NULL;
}

static void begin(int fd, int type)
{
	socks[fd] = (struct vsock){ .is = 1, .type = type, .size = DEFAULT_SIZE, .most = DEFAULT_SIZE, .ahead = -1 };
}

static void address(struct sockaddr_un *un, const char *suffix)
{
	const char *path = getenv("VSOCK_PATH");

	memset(un, 0, sizeof(*un));
	un->sun_family = AF_UNIX;
	snprintf(un->sun_path, sizeof(un->sun_path), "%s%s", path ? path : "", suffix);
}

int socket(int family, int type, int protocol)
{
	int fd = REAL(socket)(family == AF_VSOCK ? AF_UNIX : family, type, protocol);

	if (family == AF_VSOCK && fd >= 0 && fd < 1024)
		begin(fd, type);
	return fd;
}

int bind(int fd, const struct sockaddr *addr, socklen_t len)
{
	struct sockaddr_un un;
	char suffix[16];

	if (!get(fd))
		return REAL(bind)(fd, addr, len);
	snprintf(suffix, sizeof(suffix), "_%u", ((const struct sockaddr_vm *)addr)->svm_port);
	address(&un, suffix);
	unlink(un.sun_path);
	return REAL(bind)(fd, (struct sockaddr *)&un, sizeof(un));
}

int accept(int fd, struct sockaddr *addr, socklen_t *len)
{
	struct sockaddr_vm vm = { .svm_family = AF_VSOCK, .svm_cid = GUEST, .svm_port = VMADDR_PORT_ANY };
	int new;

	if (!get(fd))
		return REAL(accept)(fd, addr, len);
	new = REAL(accept)(fd, NULL, NULL);
	if (new >= 0) {
		begin(new, get(fd)->type);
		if (addr)
			memcpy(addr, &vm, *len < sizeof(vm) ? *len : sizeof(vm));
		if (len)
			*len = sizeof(vm);
	}
	return new;
}

/* Says which port is wanted, and reads the answer, a byte at a time: behind it comes what the guest sends. */
static int call(int fd, int type, unsigned int port)
{
	char line[32];
	int n = snprintf(line, sizeof(line), "CONNECT %u\n", port);

	if (send(fd, line, n, MSG_NOSIGNAL) != n)
		return -1;
	if (type == SOCK_SEQPACKET)
		return recv(fd, line, sizeof(line), 0) > 0 ? 0 : -1;
	for (n = 0; n < (int)sizeof(line); n++) {
		if (recv(fd, line + n, 1, 0) != 1)
			return -1;
		if (line[n] == '\n')
			return 0;
	}
	return -1;
}

int connect(int fd, const struct sockaddr *addr, socklen_t len)
{
	const struct sockaddr_vm *vm = (const struct sockaddr_vm *)addr;
	struct vsock *sock = get(fd);
	struct sockaddr_un un;

	if (!sock)
		return REAL(connect)(fd, addr, len);
	address(&un, sock->type == SOCK_SEQPACKET ? ".seqpacket" : "");
	if (REAL(connect)(fd, (struct sockaddr *)&un, sizeof(un)) || call(fd, sock->type, vm->svm_port)) {
		errno = ECONNRESET;
		return -1;
	}
	return 0;
}

int close(int fd)
{
	struct vsock *sock = get(fd);

	if (sock) {
		if (sock->ahead >= 0)
			REAL(close)(sock->ahead);
		sock->is = 0;
	}
	return REAL(close)(fd);
}

struct ahead {
	int from, to;
};

/* Messages from the guest, as they come, into a pipe of messages that holds as many as the test wants. */
static void *read_ahead(void *argument)
{
	struct ahead ahead = *(struct ahead *)argument;
	static char message[1 << 20];
	ssize_t n;
	struct { size_t len; char *bytes; } *list = NULL;
	size_t count = 0, next = 0;

	free(argument);
	for (;;) {
		struct pollfd fds[2] = { { ahead.from, POLLIN, 0 }, { next < count ? ahead.to : -1, POLLOUT, 0 } };

		REAL(poll)(fds, 2, -1);
		if (fds[0].revents) {
			n = REAL(recv)(ahead.from, message, sizeof(message), 0);
			if (n <= 0)
				break;
			list = realloc(list, (count + 1) * sizeof(*list));
			list[count].len = n;
			list[count].bytes = memcpy(malloc(n), message, n);
			count++;
		}
		if (fds[1].revents && REAL(send)(ahead.to, list[next].bytes, list[next].len, MSG_NOSIGNAL) > 0)
			free(list[next++].bytes);
	}
	for (; next < count; next++)
		REAL(send)(ahead.to, list[next].bytes, list[next].len, MSG_NOSIGNAL);
	shutdown(ahead.to, SHUT_WR);
	REAL(close)(ahead.from);
	REAL(close)(ahead.to);
	return NULL;
}

static void set_size(int fd, struct vsock *sock, unsigned long long size)
{
	struct ahead *ahead;
	pthread_t thread;
	int pair[2];

	sock->size = size;
	if (sock->type != SOCK_SEQPACKET || size <= DEFAULT_SIZE || sock->ahead >= 0)
		return;
	if (REAL(socketpair)(AF_UNIX, SOCK_SEQPACKET, 0, pair))
		return;
	ahead = malloc(sizeof(*ahead));
	*ahead = (struct ahead){ dup(fd), pair[1] };
	sock->ahead = pair[0];
	pthread_create(&thread, NULL, read_ahead, ahead);
	pthread_detach(thread);
}

int setsockopt(int fd, int level, int name, const void *value, socklen_t len)
{
	struct vsock *sock = get(fd);

	if (sock && level == AF_VSOCK) {
		if (name == SO_VM_SOCKETS_BUFFER_MAX_SIZE)
			sock->most = *(const unsigned long long *)value;
		else if (name == SO_VM_SOCKETS_BUFFER_SIZE)
			set_size(fd, sock, *(const unsigned long long *)value);
		return 0;
	}
	if (sock && level == SOL_SOCKET && name == SO_RCVLOWAT)
		sock->lowat = *(const int *)value;
	if (sock && level == SOL_SOCKET && name == SO_ZEROCOPY) {
		sock->zerocopy = *(const int *)value;
		return 0;
	}
	return REAL(setsockopt)(fd, level, name, value, len);
}

int getsockopt(int fd, int level, int name, void *value, socklen_t *len)
{
	struct vsock *sock = get(fd);

	if (sock && level == AF_VSOCK) {
		*(unsigned long long *)value = name == SO_VM_SOCKETS_BUFFER_MAX_SIZE ? sock->most : sock->size;
		return 0;
	}
	if (sock && level == SOL_SOCKET && name == SO_ZEROCOPY) {
		*(int *)value = sock->zerocopy;
		return 0;
	}
	return REAL(getsockopt)(fd, level, name, value, len);
}

static long long now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000LL + ts.tv_nsec / 1000000;
}

int poll(struct pollfd *fds, nfds_t count, int timeout)
{
	long long end = now_ms() + timeout;
	struct vsock *sock = NULL;

	if (count == 1)
		sock = get(fds[0].fd);
	if (sock && sock->completions) {
		fds->revents = POLLERR;
		return 1;
	}
	for (;;) {
		int there = 0, n = REAL(poll)(fds, count, timeout);

		if (!sock || sock->lowat <= 1 || n <= 0 || (fds->revents & (POLLHUP | POLLRDHUP)))
			return n;
		ioctl(fds->fd, FIONREAD, &there);
		if (there >= sock->lowat)
			return n;
		if (timeout >= 0 && now_ms() >= end) {
			fds->revents = 0;
			return 0;
		}
		usleep(1000);
	}
}

ssize_t sendmsg(int fd, const struct msghdr *msg, int flags)
{
	struct vsock *sock = get(fd);
	size_t len = 0;
	ssize_t n;

	if (!sock || !(flags & MSG_ZEROCOPY))
		return REAL(sendmsg)(fd, msg, flags);
	for (size_t i = 0; i < msg->msg_iovlen; i++)
		len += msg->msg_iov[i].iov_len;
	n = REAL(sendmsg)(fd, msg, flags & ~MSG_ZEROCOPY);
	if (n < 0 && errno == EFAULT)
		errno = ENOMEM;
	if (n >= 0 && sock->zerocopy) {
		sock->completions++;
		/* What the peer has no room for is copied. */
		sock->copied = len > DEFAULT_SIZE;
	}
	return n;
}

ssize_t recvmsg(int fd, struct msghdr *msg, int flags)
{
	struct vsock *sock = get(fd);
	struct sock_extended_err error = { .ee_origin = SO_EE_ORIGIN_ZEROCOPY };
	struct cmsghdr *control;

	if (sock && !(flags & MSG_ERRQUEUE))
		return REAL(recvmsg)(sock->ahead >= 0 ? sock->ahead : fd, msg, flags);
	if (!sock)
		return REAL(recvmsg)(fd, msg, flags);
	if (!sock->completions) {
		errno = EAGAIN;
		return -1;
	}
	sock->completions--;
	error.ee_info = error.ee_data = sock->sent++;
	error.ee_code = sock->copied ? SO_EE_CODE_ZEROCOPY_COPIED : 0;
	control = CMSG_FIRSTHDR(msg);
	control->cmsg_level = SOL_VSOCK;
	control->cmsg_type = VSOCK_RECVERR;
	control->cmsg_len = CMSG_LEN(sizeof(error));
	memcpy(CMSG_DATA(control), &error, sizeof(error));
	msg->msg_controllen = CMSG_SPACE(sizeof(error));
	msg->msg_flags = MSG_ERRQUEUE;
	return 0;
}
